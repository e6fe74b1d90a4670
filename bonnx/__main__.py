"""The `bonnx` command and `python -m bonnx`: what is imported from here on may be interrupted, too."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> int:
    """Run one command; the exit code. After Ctrl-C the process ends without taking apart what it has loaded."""
    try:
        from .command import STOPPED
        from .command import main as run

        code = run()
    except KeyboardInterrupt:
        print("bonnx: stopped", file=sys.stderr)
        os._exit(130)
    if code == STOPPED and "ray" not in sys.modules:  # Ray ends its processes on the way out
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())

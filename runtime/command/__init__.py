"""The `bonnx` command: data to stdout, everything else to stderr; exit 2 for wrong usage, 1 for failure."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import BonnxError, InputError

__all__ = ["main", "print_json", "print_text"]

# Each module has `configure(parser)` and `run(arguments) -> exit code`; only the one that is asked for is imported.
_COMMANDS = {
    "export": ("bonnx.export.command", "write a model as an artifact and verify it"),
    "inspect": ("bonnx.runtime.command.inspect", "say what an artifact holds"),
    "verify": ("bonnx.runtime.command.verify", "prove an artifact on this machine"),
    "doctor": ("bonnx.runtime.command.doctor", "say what is installed and what is wrong with it"),
    "generate": ("bonnx.runtime.command.generate", "sample completions, score them and choose the best"),
    "report": ("bonnx.runtime.command.report", "show a search run in a browser or in the terminal"),
    "rank": ("bonnx.runtime.command.rank", "score candidates after a prompt and choose the best"),
    "batch": ("bonnx.runtime.command.batch", "rank every row of a file"),
    "serve": ("bonnx.runtime.command.serve", "put a model behind HTTP"),
}
# What a command needs that is not installed with bonnx itself; `export` for those that are not here.
_EXTRAS = {"serve": "serve"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="bonnx", description="Best-of-N on ONNX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    module: Any = None
    for name, (path, summary) in _COMMANDS.items():
        subparser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == chosen:
            try:
                module = importlib.import_module(path)
            except ModuleNotFoundError as e:
                if (e.name or "").startswith("bonnx"):
                    raise
                extra = _EXTRAS.get(name, "export")
                print(f"bonnx {name}: {e.name} is not installed; run `pip install bonnx[{extra}]`", file=sys.stderr)
                return 1
            module.configure(subparser)
            subparser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    arguments = parser.parse_args(argv)
    try:
        code: int = module.run(arguments)
    except (BonnxError, ValueError) as e:
        if not isinstance(e, BonnxError) and type(e).__name__ != "ConfigError":
            raise
        if arguments.json:
            print_json({"ok": False, "error": type(e).__name__, "reason": str(e)})
        print(f"bonnx {arguments.command}: {e}", file=sys.stderr)
        return 2 if isinstance(e, InputError) else 1
    except KeyboardInterrupt:
        print(f"bonnx {arguments.command}: stopped", file=sys.stderr)
        return 130
    return code


def print_json(value: dict[str, Any]) -> None:
    """One object on stdout; in ASCII where it holds what stdout's encoding does not, such as half a surrogate pair."""
    try:
        print(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except UnicodeEncodeError:
        print(json.dumps(value, allow_nan=False))


def print_text(line: str) -> None:
    """A line on stdout; what stdout's encoding does not hold is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))

"""Files and folders that are being written: they are deleted however the process ends, except by a kill."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["discard_unfinished", "unfinished"]

_PATHS: set[Path] = set()


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """A file or folder that is deleted when the block ends, or when the process ends within it.

    A finished one has been moved to its place by then.
    """
    _PATHS.add(path)
    try:
        yield
    finally:
        _discard(path)
        _PATHS.discard(path)


def discard_unfinished() -> None:
    """Delete everything that is half-written, before the process ends."""
    for path in [*_PATHS]:
        with contextlib.suppress(OSError):
            _discard(path)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

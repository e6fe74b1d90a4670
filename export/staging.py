"""Write a folder completely or not at all: it is written next to its destination and moved there at the end."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bonnx.errors import ExportError
from bonnx.runtime.artifact.folder import MANIFEST
from bonnx.runtime.artifact.unfinished import unfinished

__all__ = ["check_output", "staged"]


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an unsuitable output folder before any work is done.

    Raises:
        ExportError: if it exists without `overwrite`, or replacing it would delete anything but an artifact.
    """
    if not output.exists():
        return
    if not overwrite:
        raise ExportError(f"{output} exists; choose another folder, or pass --overwrite to replace it")
    if not (output / MANIFEST).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"{output} is not an artifact, so --overwrite does not replace it; choose another folder")


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `output` that replaces it if the block succeeds and is deleted otherwise.

    Raises:
        ExportError: if the folder cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as e:
        raise ExportError(f"cannot write to {output.parent}: {e.strerror or e}; choose another folder") from e
    try:
        with unfinished(staging):
            # mkdtemp creates a folder that only its owner can read.
            staging.chmod(0o755)
            yield staging
            if output.exists():
                _replace(output, staging)
            else:
                staging.rename(output)
    except OSError as e:
        raise ExportError(f"cannot write {output}: {e.strerror or e}; nothing was left behind") from e


def _replace(output: Path, staging: Path) -> None:
    """Replace a folder by a new one; the old one is restored if that fails or is interrupted."""
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    old = aside / "old"
    try:
        output.rename(old)
        staging.rename(output)
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
        shutil.rmtree(aside, ignore_errors=True)

"""A folder that appears whole or not at all: it is written beside its place and moved there at the end."""

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
    """Refuse an output folder before any work is done.

    Raises:
        ExportError: it exists and may not be replaced, or replacing it would delete what is not an artifact.
    """
    if not output.exists():
        return
    if not overwrite:
        raise ExportError(f"{output} exists; choose another folder, or pass --overwrite to replace it")
    if not (output / MANIFEST).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError(f"{output} is not an artifact, so --overwrite does not replace it; choose another folder")


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place if the block succeeds, and is deleted if not."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as e:
        raise ExportError(f"cannot write to {output.parent}: {e.strerror or e}; choose another folder") from e
    try:
        with unfinished(staging):
            # mkdtemp makes a folder that only its owner can read.
            staging.chmod(0o755)
            yield staging
            if output.exists():
                _replace(output, staging)
            else:
                staging.rename(output)
    except OSError as e:
        raise ExportError(f"cannot write {output}: {e.strerror or e}; nothing was left behind") from e


def _replace(output: Path, staging: Path) -> None:
    """Put a new folder in the place of an old one, which goes back if that fails or is interrupted."""
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    old = aside / "old"
    try:
        output.rename(old)
        staging.rename(output)
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
        shutil.rmtree(aside, ignore_errors=True)

"""bonnx: Best-of-N on ONNX. A two-headed transformer becomes ONNX graphs that choose the best of N themselves."""

from __future__ import annotations

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "runtime").is_dir():
    # A source tree or an editable install: the rooms stand beside this folder, not in it.
    __path__.append(str(_here.parent))

__version__ = "0.1.0"

from .runtime import *  # noqa: E402, F403 - the path above comes first; runtime's names are bonnx's
from .runtime import __all__  # noqa: E402, F401

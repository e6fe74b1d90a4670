"""bonnx: Best-of-N on ONNX. Two-headed transformers as ONNX graphs that choose the best of N candidates themselves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

_here = os.path.dirname(os.path.realpath(__file__))
if not os.path.isdir(os.path.join(_here, "runtime")):
    # A source tree or an editable install: the other folders are beside this one, not in it.
    __path__.append(os.path.dirname(_here))

__version__ = "0.1.0"

from bonnx.runtime import __all__  # noqa: E402

from . import runtime  # noqa: E402 - the path above comes first

if TYPE_CHECKING:
    from bonnx.runtime import *  # noqa: F403


def __getattr__(name: str) -> object:
    """The public names of `runtime`, each imported on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(runtime, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

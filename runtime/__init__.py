"""An artifact gives answers: load, score, rank. numpy and ONNX Runtime only.

A name is imported when it is asked for: `bonnx --version` and `bonnx doctor` need nothing but Python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bonnx.errors import ArtifactError, BonnxError, ExportError, InputError, NoWinnerError, ProviderError

    from .artifact.manifest import AGGREGATIONS
    from .generate.result import FINISH_REASONS, Candidate, Generation
    from .model import Model, load
    from .protocol import ModelLike
    from .rank.result import Ranking, Scored
    from .testing import FakeModel
    from .verification import Check, verify

_PLACES = {
    "AGGREGATIONS": "artifact.manifest",
    "FINISH_REASONS": "generate.result",
    "ArtifactError": ".errors",
    "BonnxError": ".errors",
    "Candidate": "generate.result",
    "Check": "verification",
    "ExportError": ".errors",
    "FakeModel": "testing",
    "Generation": "generate.result",
    "InputError": ".errors",
    "Model": "model",
    "ModelLike": "protocol",
    "NoWinnerError": ".errors",
    "ProviderError": ".errors",
    "Ranking": "rank.result",
    "Scored": "rank.result",
    "load": "model",
    "verify": "verification",
}

__all__ = [
    "AGGREGATIONS",
    "FINISH_REASONS",
    "ArtifactError",
    "BonnxError",
    "Candidate",
    "Check",
    "ExportError",
    "FakeModel",
    "Generation",
    "InputError",
    "Model",
    "ModelLike",
    "NoWinnerError",
    "ProviderError",
    "Ranking",
    "Scored",
    "load",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})

"""Open an artifact and rank, score, generate or search with it. Needs only NumPy and ONNX Runtime.

Each name is imported on first use: `bonnx --version` and `bonnx doctor` need nothing but Python.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bonnx.errors import (
        ArtifactError,
        BonnxError,
        ExportError,
        InputError,
        NoWinnerError,
        ProviderError,
        UpstreamError,
    )

    from .artifact.manifest import AGGREGATIONS
    from .best_of_n.best_of_n import BestOfN
    from .best_of_n.result import BestOfNResult
    from .best_of_n.reward import reward_function
    from .generate.result import FINISH_REASONS, Candidate, Generation
    from .model import Model, load
    from .protocol import ModelLike
    from .rank.result import Ranking, Scored
    from .testing import FakeModel
    from .upstream.client import Upstream
    from .upstream.completion import Completion, Failure
    from .verification import Check, verify

_PLACES = {
    "AGGREGATIONS": "artifact.manifest",
    "FINISH_REASONS": "generate.result",
    "ArtifactError": ".errors",
    "BestOfN": "best_of_n.best_of_n",
    "BestOfNResult": "best_of_n.result",
    "BonnxError": ".errors",
    "Candidate": "generate.result",
    "Check": "verification",
    "Completion": "upstream.completion",
    "ExportError": ".errors",
    "Failure": "upstream.completion",
    "FakeModel": "testing",
    "Generation": "generate.result",
    "InputError": ".errors",
    "Model": "model",
    "ModelLike": "protocol",
    "NoWinnerError": ".errors",
    "ProviderError": ".errors",
    "Ranking": "rank.result",
    "Scored": "rank.result",
    "Upstream": "upstream.client",
    "UpstreamError": ".errors",
    "load": "model",
    "reward_function": "best_of_n.reward",
    "verify": "verification",
}

__all__ = [
    "AGGREGATIONS",
    "FINISH_REASONS",
    "ArtifactError",
    "BestOfN",
    "BestOfNResult",
    "BonnxError",
    "Candidate",
    "Check",
    "Completion",
    "ExportError",
    "Failure",
    "FakeModel",
    "Generation",
    "InputError",
    "Model",
    "ModelLike",
    "NoWinnerError",
    "ProviderError",
    "Ranking",
    "Scored",
    "Upstream",
    "UpstreamError",
    "load",
    "reward_function",
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

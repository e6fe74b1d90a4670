"""An artifact gives answers: load, score, rank. numpy and ONNX Runtime only."""

from .errors import ArtifactError, BonnxError, ExportError, InputError, NoWinnerError, ProviderError
from .generation import FINISH_REASONS, Candidate, Generation
from .manifest import AGGREGATIONS
from .model import Model, load
from .ranking import Ranking, Scored
from .testing import FakeModel
from .verify import Check, verify

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
    "NoWinnerError",
    "ProviderError",
    "Ranking",
    "Scored",
    "load",
    "verify",
]

"""An artifact gives answers: load, score, rank. numpy and ONNX Runtime only."""

from .errors import ArtifactError, BonnxError, ExportError, InputError, NoWinnerError, ProviderError
from .manifest import AGGREGATIONS
from .model import Model, Ranking, Scored, load

__all__ = [
    "AGGREGATIONS",
    "ArtifactError",
    "BonnxError",
    "ExportError",
    "InputError",
    "Model",
    "NoWinnerError",
    "ProviderError",
    "Ranking",
    "Scored",
    "load",
]

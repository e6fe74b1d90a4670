"""Every error that bonnx raises on purpose.

BonnxError
|-- ArtifactError      the folder is not an artifact, or not as it was written
|-- ProviderError      ONNX Runtime, or the provider that was requested, is unavailable
|-- InputError         what was passed in cannot be ranked (also a ValueError)
|-- ConfigError        in `bonnx.models`: a checkpoint or configuration that cannot be read (also a ValueError)
|-- NoWinnerError      every candidate is empty or its score is NaN
|-- ExportError        the model could not be exported, or the artifact failed its verification
`-- UpstreamError      no completion came from the server or function that generates them
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "BonnxError",
    "ExportError",
    "InputError",
    "NoWinnerError",
    "ProviderError",
    "UpstreamError",
    "near_miss",
]


def near_miss(name: object, known: Iterable[str], otherwise: str = "known options") -> str:
    """The hint for an unknown name: the one that was probably meant, or all known names."""
    names = [*known]
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"{otherwise}: {', '.join(names)}"


class BonnxError(Exception):
    """The root: the message says what failed, what was expected, what was found and what to do."""


class ArtifactError(BonnxError):
    """The folder is not an artifact that this version can read, or it is not as it was written."""


class ProviderError(BonnxError):
    """ONNX Runtime is missing or broken, or the session does not run on the requested provider."""


class InputError(BonnxError, ValueError):
    """A prompt, candidate or option that cannot be ranked."""


class NoWinnerError(BonnxError):
    """No candidate can win: each is empty or its score is NaN."""


class ExportError(BonnxError):
    """The model could not be exported, or the artifact failed its verification; nothing was written."""


class UpstreamError(BonnxError):
    """No completion came from the server or function that generates them.

    Attributes:
        status: the HTTP status of every failure, if they have one in common.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

"""One row of the table: a model that people use, a small checkpoint of its architecture, and what is expected of it.

To add rows, add a module to `rows/` with a list `ROWS`; every module of that folder is found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

__all__ = ["ALLOWED", "Case", "Check", "Row"]

ALLOWED = 1e-5
"""Largest difference from the reference, relative to the largest score of a check, in float32."""

Messages: TypeAlias = list[dict[str, str]]


@dataclass(frozen=True)
class Check:
    """A prompt, its candidates, and the scores that the reference gives them.

    Attributes:
        prompt: text or messages; None to score whole rows (`Model.score`).
        candidates: texts, conversations or documents.
        expected: (N,) float, the reference's scores.
        options: further arguments of `rank` or `score`.
    """

    prompt: str | Messages | None
    candidates: Sequence[Any]
    expected: np.ndarray[Any, np.dtype[np.floating[Any]]]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """What a checkpoint that was written must give.

    Attributes:
        checks: the comparisons.
        arguments: options of `bonnx export`, such as `--label-tokens`; none for most models.
        checkpoint: what `--checkpoint` names, if it is not the folder itself: a file in it, or a folder beside it.
    """

    checks: Sequence[Check]
    arguments: Sequence[str] = ()
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        model: name by which people know the model.
        head: what its score is computed from, and where it is read.
        reference: what it is compared with.
        build: writes a checkpoint into an empty folder, with random weights of a generator, and returns its case.
    """

    model: str
    head: str
    reference: str
    build: Callable[[Path, np.random.Generator], Case]

"""The results of ranking and scoring."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bonnx.errors import NoWinnerError

from ..results import Result
from ..text.reader import Item

__all__ = ["Ranking", "Scored", "winner"]


@dataclass(frozen=True, eq=False, repr=False)
class Ranking(Result):
    """The result of `Model.rank`.

    Attributes:
        best_index: index of the winner; ties go to the lowest.
        best: the winner, as it was passed.
        candidate_scores: (num_candidates,) float32; NaN for a candidate that cannot win.
        scores: for each candidate (its length,) float32, one score for each of its tokens.
        aggregation: how a candidate's scores became one.
        order: indices, best first: with a vote by the score of the candidate's answer and then its own; otherwise by
            its own. Those that cannot win come last.
        margin: the lead of the winner: its score minus the next candidate's, or with a vote its answer's score minus
            the next answer's; None if there is no other.
        answers: for each candidate what it votes for, None for none; None if no answers were given.
        group_scores: (num_candidates,) float32, with a vote: the sum of weights or count of each candidate's answer,
            NaN for one that cannot win; each candidate's own score if none that counts has an answer.
        step_scores: for each candidate its scores where a step ends, (steps,) float32; None unless the aggregation
            reads steps.
        cut: number of tokens dropped from the beginning of the prompt, with `truncate`.
        unreadable: for each candidate that could not be read (it is empty, or the tokenizer cannot encode it) its index
            and why; its score is NaN, and it has no `scores`.
        objectives: of a model whose score is weighted by a gate, what it weighs: for each name (num_candidates,)
            float32, aggregated as the scores are; None for any other.
    """

    _optional: ClassVar[tuple[str, ...]] = ("step_scores", "cut", "unreadable", "answers", "group_scores", "objectives")
    _summary: ClassVar[tuple[str, ...]] = ("best_index", "best", "candidate_scores", "margin", "aggregation")

    best_index: int
    best: Item
    candidate_scores: NDArray[np.float32]
    scores: list[NDArray[np.float32]]
    aggregation: str
    order: tuple[int, ...]
    margin: float | None
    answers: tuple[Hashable | None, ...] | None
    group_scores: NDArray[np.float32] | None
    step_scores: list[NDArray[np.float32]] | None = None
    cut: int = 0
    unreadable: Mapping[int, str] = field(default_factory=dict)
    objectives: Mapping[str, NDArray[np.float32]] | None = None

    def _columns(self) -> dict[str, Sequence[object]]:
        return _columns(self, self.candidate_scores)


@dataclass(frozen=True, eq=False, repr=False)
class Scored(Result):
    """The result of `Model.score`.

    Attributes:
        best_index: index of the best row.
        row_scores: (rows,) float32.
        scores: for each row (its length,) float32.
        backbone: for each row (its length, hidden_size) float32, or None if it was not requested.
        aggregation: how a row's scores became one.
        order: as in `Ranking`, as are the following.
    """

    _optional: ClassVar[tuple[str, ...]] = ("backbone", "unreadable", "answers", "group_scores", "objectives")
    _summary: ClassVar[tuple[str, ...]] = ("best_index", "row_scores", "margin", "aggregation")

    best_index: int
    row_scores: NDArray[np.float32]
    scores: list[NDArray[np.float32]]
    backbone: list[NDArray[np.float32]] | None
    aggregation: str
    order: tuple[int, ...]
    margin: float | None
    answers: tuple[Hashable | None, ...] | None
    group_scores: NDArray[np.float32] | None
    unreadable: Mapping[int, str] = field(default_factory=dict)
    objectives: Mapping[str, NDArray[np.float32]] | None = None

    def _columns(self) -> dict[str, Sequence[object]]:
        return _columns(self, self.row_scores)


def winner(index: int, kind: str) -> int:
    """The index that a graph chose.

    Raises:
        NoWinnerError: there is none.
    """
    if index < 0:
        raise NoWinnerError(f"none of the {kind} can win: every score is NaN; look for NaN or infinity in the inputs")
    return index


def _columns(result: Ranking | Scored, scores: NDArray[np.float32]) -> dict[str, Sequence[object]]:
    """One row for each candidate."""
    columns: dict[str, Sequence[object]] = {"#": range(len(scores)), "score": [*scores]}
    columns["tokens"] = [len(token_scores) for token_scores in result.scores]
    if result.answers is not None:
        columns["answer"] = result.answers
    if result.group_scores is not None:
        columns["answer's score"] = [*result.group_scores]
    return columns

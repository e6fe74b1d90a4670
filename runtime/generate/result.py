"""The results of generation: candidates and the winner."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..results import Result

__all__ = ["FINISH_REASONS", "Candidate", "Generation", "candidate_columns"]

FINISH_REASONS = ("length", "stop", "pruned", "deadline")
"""Why a completion ended. The output `finish_reasons` of a graph is an index into the first three."""


@dataclass(frozen=True, eq=False, repr=False)
class Candidate(Result):
    """One completion.

    Attributes:
        text: the text that it adds to the prompt's, without special tokens. It ends before the artifact's own end or
            stop token and before a stop text of the caller; a stop token that the caller passed as an id stays. None
            if the artifact has no tokenizer.
        tokens: (length,) int64: all that were drawn, the stop token or those of the stop text included.
        scores: (length,) float32, the scorer's value at each token.
        log_probs: (length,) float32, of each token under the model itself (temperature 1, unfiltered), in nats.
        score: the candidate's score; NaN for one that cannot win.
        finish_reason: `stop`, `length`, `pruned`, `deadline`, or None while it grows.
        top_tokens: (length, k) int64, with `top_log_probs` the k tokens that were most likely at each place, the most
            likely first.
        top_log_probs: (length, k) float32, of each of them under the model itself, in nats.
    """

    _optional: ClassVar[tuple[str, ...]] = ("top_tokens", "top_log_probs")
    _summary: ClassVar[tuple[str, ...]] = ("text", "score", "tokens", "finish_reason")

    text: str | None
    tokens: NDArray[np.int64]
    scores: NDArray[np.float32]
    log_probs: NDArray[np.float32]
    score: float
    finish_reason: str | None
    top_tokens: NDArray[np.int64] | None = None
    top_log_probs: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Generation(Result):
    """N completions of one prompt.

    Attributes:
        best_index: index of the winner; ties go to the lowest; -1 while nothing can win.
        candidates: in the order of their numbers: the first 8 of 16 are those of 8.
        prompt_tokens: tokens of the prompt, computed once.
        computed_tokens: tokens that the network read for all candidates together, without the prompt.
        aggregation: how a candidate's scores became one.
        answers: what each candidate votes for, None for no answer; None if no answers were asked for.
        group_scores: (n,) float32, with a vote: as in `Ranking`.
    """

    _optional: ClassVar[tuple[str, ...]] = ("answers", "group_scores")
    _summary: ClassVar[tuple[str, ...]] = ("best_index", "best", "candidates", "prompt_tokens", "computed_tokens")

    best_index: int
    candidates: list[Candidate]
    prompt_tokens: int
    computed_tokens: int
    aggregation: str
    answers: tuple[Hashable | None, ...] | None = None
    group_scores: NDArray[np.float32] | None = None

    @property
    def best(self) -> Candidate:
        """The winner."""
        return self.candidates[self.best_index]

    def _columns(self) -> dict[str, Sequence[object]]:
        columns = candidate_columns(self.candidates)
        if self.answers is not None:
            columns["answer"] = self.answers
        if self.group_scores is not None:
            columns["answer's score"] = [*self.group_scores]
        return columns


def candidate_columns(candidates: Sequence[Candidate]) -> dict[str, Sequence[object]]:
    """One row for each candidate, for the table of a notebook."""
    return {
        "#": range(len(candidates)),
        "score": [candidate.score for candidate in candidates],
        "tokens": [len(candidate.tokens) for candidate in candidates],
        "end": [candidate.finish_reason for candidate in candidates],
        "text": [candidate.tokens.tolist() if candidate.text is None else candidate.text for candidate in candidates],
    }

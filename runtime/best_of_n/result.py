"""What best-of-N over a generator chose, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..rank.result import Ranking
from ..results import Result
from ..upstream.completion import Completion, Failure

__all__ = ["BestOfNResult"]


@dataclass(frozen=True, eq=False, repr=False)
class BestOfNResult(Result):
    """The best completion and everything beside it.

    Attributes:
        best_index: index of the best completion.
        completions: those that came, in the order in which they ended.
        ranking: their scores, order, margin, answers and votes.
        failures: one for each completion that was asked for and did not come.
        method: the name of the method.
        seconds: wall time.
        prompt_tokens: of all requests, as the generator counts them; None if it does not.
        completion_tokens: likewise.
        saved: number of completions that `adaptive` did not ask for, because they were not worth their price.
        requests: number of requests, retries included; 0 where the generator is no upstream.
    """

    _summary: ClassVar[tuple[str, ...]] = ("best", "completions", "failures", "method", "seconds")

    best_index: int
    completions: list[Completion]
    ranking: Ranking
    failures: list[Failure]
    method: str
    seconds: float
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    requests: int = 0
    saved: int = 0

    @property
    def best(self) -> Completion:
        """The best completion."""
        return self.completions[self.best_index]

    def _columns(self) -> dict[str, Sequence[object]]:
        return {
            "#": range(len(self.completions)),
            "score": [*self.ranking.candidate_scores],
            **({} if self.ranking.answers is None else {"answer": self.ranking.answers}),
            "end": [completion.finish_reason for completion in self.completions],
            "text": [completion.text or completion.message for completion in self.completions],
        }

"""The result of a search: the candidates, the cost, and how they grew."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..generate.result import Candidate, candidate_columns
from ..results import Result, to_json

__all__ = ["Cost", "Node", "SearchResult"]


@dataclass
class Cost:
    """The cost of a search.

    Attributes:
        prompt_tokens: tokens of prompts that were computed: once for a tree, once for each attempt of a revision.
        sampled_tokens: tokens drawn, including those of dropped branches and of lookahead.
        computed_tokens: tokens that the network read after the prompts: the sampled ones, and one more for each
            branch that was forked.
        scored_tokens: tokens that the scorer rated: the computed ones, or those passed to the caller's own scorer.
        seconds: wall time.
    """

    prompt_tokens: int = 0
    sampled_tokens: int = 0
    computed_tokens: int = 0
    scored_tokens: int = 0
    seconds: float = 0.0


@dataclass
class Node:
    """A piece of a candidate: one step of a search by steps, else all of it.

    Attributes:
        parent: index of the node before it, None at the prompt.
        tokens: its token ids.
        scores: one for each token.
        score: by which it was judged; NaN if there is none.
        round: the round in which it grew, from 0.
        fate: `kept` (it was branched), `dropped`, `finished`, `cut` (by a limit or deadline) or `pruned`.
        lookahead: the token ids beyond it that its score was read from, if the method looks ahead.
    """

    parent: int | None
    tokens: list[int]
    scores: list[float]
    score: float
    round: int
    fate: str
    lookahead: list[int] | None = None


@dataclass(frozen=True, eq=False, repr=False)
class SearchResult(Result):
    """The result of `Model.search`.

    Attributes:
        method: its name, and `options` how it was set.
        best_index: index of the winner.
        candidates: all candidates.
        vote: how the winner was chosen: `score`, `weighted`, `majority` or `borda`.
        answers: what each candidate votes for; None if `answers` was not given.
        group_scores: (candidates,) float32: with a vote, of each candidate's answer; else each one's own score.
        cost: what was computed.
        nodes: the pieces that grew, in the order in which they were judged.
        leaves: for each candidate its last node.
        policy: how a policy judged the prompt, if one chose the method.
    """

    _summary: ClassVar[tuple[str, ...]] = ("method", "best_index", "best", "vote", "candidates", "cost")

    method: str
    options: dict[str, object]
    best_index: int
    candidates: list[Candidate]
    vote: str
    answers: tuple[Hashable | None, ...] | None
    group_scores: NDArray[np.float32]
    cost: Cost
    nodes: list[Node]
    leaves: list[int]
    policy: dict[str, object] | None = None

    @property
    def best(self) -> Candidate:
        """The winner."""
        return self.candidates[self.best_index]

    def _columns(self) -> dict[str, Sequence[object]]:
        votes = {} if self.answers is None else {"answer": self.answers, "answer's score": [*self.group_scores]}
        return candidate_columns(self.candidates) | votes

    def to_record(self, prompt: object, pieces: Callable[[Sequence[int]], list[str]]) -> dict[str, object]:
        """A line of `searches.jsonl`, which `bonnx report` reads: `to_dict` by candidate, with the text of every token.

        Args:
            prompt: as it was passed.
            pieces: gives the text of each of some token ids, as `Model.pieces`.
        """
        answers = self.answers or [None] * len(self.candidates)
        votes = zip(self.candidates, answers, self.group_scores, self.leaves, strict=True)
        return {
            "prompt": prompt,
            "method": self.method,
            "options": to_json(self.options),
            "best_index": self.best_index,
            "vote": self.vote,
            "candidates": [
                {
                    "text": candidate.text,
                    "pieces": pieces(candidate.tokens.tolist()),
                    "tokens": to_json(candidate.tokens),
                    "scores": to_json(candidate.scores),
                    "score": to_json(candidate.score),
                    "finish_reason": candidate.finish_reason,
                    "answer": None if answer is None else str(answer),
                    "group_score": to_json(group),
                    "node": leaf,
                }
                for candidate, answer, group, leaf in votes
            ],
            "nodes": [
                to_json(node)
                | {
                    "pieces": pieces(node.tokens),
                    "lookahead": None if node.lookahead is None else "".join(pieces(node.lookahead)),
                }
                for node in self.nodes
            ],
            "cost": to_json(self.cost),
            "policy": to_json(self.policy),
        }

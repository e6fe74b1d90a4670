"""What a search found, what it cost, and how it went."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..generate.result import Candidate

__all__ = ["Cost", "Node", "SearchResult"]


@dataclass
class Cost:
    """What a search took.

    Attributes:
        prompt_tokens: tokens of prompts that were computed: once for a tree, once for each attempt of a revision.
        sampled_tokens: tokens drawn, those of dropped branches and of lookahead included.
        computed_tokens: tokens that the network read after the prompts: the sampled ones, and one more for each
            branch that was forked.
        scored_tokens: tokens that the scorer rated: the computed ones, or what was passed to a scorer of your own.
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
        score: what it was judged by; NaN if it could not be rated.
        round: in which it grew, from 0.
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


@dataclass(frozen=True)
class SearchResult:
    """The winner and everything beside it.

    Attributes:
        method: its name, and `options` how it was set.
        best_index: index of the winner.
        candidates: those that the choice was made from.
        vote: how it was made: `score`, `weighted`, `majority` or `borda`.
        answers: what each candidate votes for; None if no answers were asked for.
        group_scores: (candidates,) float32: with a vote, of each candidate's answer; else each one's own score.
        cost: what it took.
        nodes: the pieces that grew, in the order in which they were judged.
        leaves: for each candidate its last node.
        policy: what a policy said of the prompt, if one chose the method.
    """

    method: str
    options: dict[str, Any]
    best_index: int
    candidates: list[Candidate]
    vote: str
    answers: tuple[Hashable | None, ...] | None
    group_scores: NDArray[np.float32]
    cost: Cost
    nodes: list[Node] = field(repr=False)
    leaves: list[int] = field(repr=False)
    policy: dict[str, Any] | None = None

    @property
    def best(self) -> Candidate:
        """The winner."""
        return self.candidates[self.best_index]

    def as_json(self, prompt: Any, pieces: Any) -> dict[str, Any]:
        """A JSON object; what is not a number is null.

        Args:
            prompt: as it was asked.
            pieces: gives the text of each of some token ids.
        """
        answers = self.answers or [None] * len(self.candidates)
        rows = zip(self.candidates, answers, self.group_scores.tolist(), self.leaves, strict=True)
        return {
            "prompt": prompt,
            "method": self.method,
            "options": _plain(self.options),
            "best_index": self.best_index,
            "vote": self.vote,
            "candidates": [
                {
                    "text": candidate.text,
                    "pieces": pieces(candidate.tokens.tolist()),
                    "tokens": candidate.tokens.tolist(),
                    "scores": _numbers(candidate.scores.tolist()),
                    "score": _number(candidate.score),
                    "finish_reason": candidate.finish_reason,
                    "answer": None if answer is None else str(answer),
                    "group_score": _number(group),
                    "node": leaf,
                }
                for candidate, answer, group, leaf in rows
            ],
            "nodes": [
                {
                    **asdict(node),
                    "pieces": pieces(node.tokens),
                    "scores": _numbers(node.scores),
                    "score": _number(node.score),
                    "lookahead": None if node.lookahead is None else "".join(pieces(node.lookahead)),
                }
                for node in self.nodes
            ],
            "cost": asdict(self.cost),
            "policy": None if self.policy is None else _plain(self.policy),
        }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _number(value) if isinstance(value, float) else value for name, value in values.items()}


def _numbers(values: list[float]) -> list[float | None]:
    return [_number(value) for value in values]

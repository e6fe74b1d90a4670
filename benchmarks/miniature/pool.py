"""A model's samples, and the ones that each method of selection would have selected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bonnx.runtime.search.sampling import SelfCertainty, borda

from .work import POOL

__all__ = [
    "AGGREGATIONS",
    "Array",
    "Pool",
    "adaptive",
    "by_certainty",
    "by_score",
    "by_vote",
    "majority",
    "weighted",
]

Array: TypeAlias = NDArray[np.float64]
AGGREGATIONS: dict[str, Callable[[Sequence[float], float], float]] = {
    "last": lambda steps, last: last,
    "min": lambda steps, last: min([*steps, last]),
    "prod": lambda steps, last: float(np.prod([*steps, last])),
    "mean": lambda steps, last: float(np.mean([*steps, last])),
}


@dataclass
class Pool:
    """A model's samples: arrays (puzzles, samples)."""

    right: NDArray[np.bool_]
    answers: NDArray[np.int64]
    score: Array
    certainty: Array
    tokens: Array
    steps: list[list[list[float]]]
    probe_right: Array
    probe_score: Array
    probe_tokens: Array

    @classmethod
    def read(cls, results: Mapping[str, Any], model: str) -> Pool:
        """Read the samples of all puzzles up to the first without any."""
        rows = []
        while f"{model}/pool/{len(rows)}" in results:
            rows.append(results[f"{model}/pool/{len(rows)}"])
        arrays = {key: np.array([row[key] for row in rows]) for key in rows[0] if key != "steps"}
        arrays["right"] = arrays["right"].astype(bool)
        return cls(**arrays, steps=[row["steps"] for row in rows])

    def aggregated(self, name: str) -> Array:
        """Return another score of each sample, aggregated from the scores at the ends of its steps."""
        rule = AGGREGATIONS[name]
        return np.array(
            [[rule(s, last) for s, last in zip(*row, strict=True)] for row in zip(self.steps, self.score, strict=True)]
        )

    def accuracy(self, budget: int, choose: Callable[[Array, NDArray[np.int64]], int], scores: Array) -> Array:
        """Return how often each puzzle is solved (n,), over disjoint groups of `budget` samples."""
        right = np.zeros(len(self.right))
        for start in range(0, POOL, budget):
            part = slice(start, start + budget)
            for i in range(len(right)):
                right[i] += self.right[i, part][choose(scores[i, part], self.answers[i, part])]
        return right * budget / POOL

    def solvable(self, budget: int) -> Array:
        """Return how often any of `budget` samples is right (n,)."""
        groups = self.right.reshape(len(self.right), -1, budget)
        return groups.any(2).mean(1)

    def spent(self, budget: int) -> Array:
        """Return the mean number of tokens of `budget` samples (n,)."""
        return self.tokens.mean(1) * budget


def by_score(scores: Array, answers: NDArray[np.int64]) -> int:
    """Select by best-of-N."""
    return int(scores.argmax())


def by_vote(weights: Array, scores: Array, answers: NDArray[np.int64]) -> int:
    """Select the best candidate of the answer with the largest weight; without any answer, the best candidate."""
    voters = answers >= 0
    if not voters.any():
        return by_score(scores, answers)
    sums = np.bincount(answers[voters], weights[voters], minlength=1)
    totals = np.where(voters, sums[np.maximum(answers, 0)], -np.inf)
    leader = answers[totals.argmax()]
    return int(np.where(answers == leader, scores, -np.inf).argmax())


def weighted(scores: Array, answers: NDArray[np.int64]) -> int:
    """Select by best-of-N weighted."""
    return by_vote(scores, scores, answers)


def majority(scores: Array, answers: NDArray[np.int64]) -> int:
    """Select by majority vote."""
    return by_vote(np.ones(len(scores)), scores, answers)


def by_certainty(certainties: Array, answers: NDArray[np.int64]) -> int:
    """Select by self-certainty with Borda voting."""
    return borda(certainties, answers, SelfCertainty.power)[0]


def adaptive(
    pool: Pool, price: float, choose: Callable[[Array, NDArray[np.int64]], int], most: int = POOL, batch: int = 4
) -> tuple[Array, Array]:
    """Return tokens and how often each puzzle is solved, (n,) each, if `adaptive`'s rule `gain` stops sampling."""
    right, spent = np.zeros((2, len(pool.right)))
    starts = range(0, POOL, POOL // 8)
    for start in starts:
        order = np.roll(np.arange(POOL), -start)
        best = np.maximum.accumulate(pool.score[:, order], 1)[:, batch - 1 : most : batch]
        count = np.arange(batch, most + 1, batch)
        enough = (1 - best) / (count + 1) <= price
        stop = count[np.where(enough.any(1), enough.argmax(1), len(count) - 1)]
        for i, n in enumerate(stop):
            rows = order[:n]
            right[i] += pool.right[i, rows][choose(pool.score[i, rows], pool.answers[i, rows])]
            spent[i] += pool.tokens[i, rows].sum()
    return spent / len(starts), right / len(starts)

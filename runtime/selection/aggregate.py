"""The selection in NumPy: the same rules as in the graphs, for fake models, searches and checks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bonnx.errors import InputError

from ..arrays import Array
from ..artifact.manifest import AGGREGATIONS
from ..checks import shown

__all__ = ["aggregate", "aggregate_tokens", "aggregation_code", "best_of_n", "elect", "is_stepwise"]

_READ: dict[str, Callable[[Array], float]] = {
    "last": lambda x: float(x[-1]),
    "mean": lambda x: float(x.mean(dtype=np.float64)),
    "min": lambda x: float(x.min()),
    "max": lambda x: float(x.max()),
    "prod": lambda x: float(x.prod(dtype=np.float64)),
}


def is_stepwise(name: str) -> bool:
    """Whether an aggregation reads only the positions where a step ends."""
    return name.startswith("step_")


def aggregation_code(name: str) -> int:
    """The graph's number for an aggregation.

    Raises:
        InputError: no such aggregation.
    """
    plain = name.removeprefix("step_") if isinstance(name, str) else ""
    if plain not in AGGREGATIONS:
        choices = ", ".join([*AGGREGATIONS, *(f"step_{n}" for n in AGGREGATIONS)])
        raise InputError(f"aggregation: expected one of {choices}; got {shown(name)}")
    return AGGREGATIONS.index(plain)


def aggregate(scores: Array, mask: Array, step_mask: Array, name: str) -> tuple[Array, Array]:
    """Candidate scores and the winners.

    Args:
        scores: (N, B, T) float32.
        mask: (N, B, T) int64, above 0 where a token is real.
        step_mask: broadcastable to (N, B, T), above 0 where a step ends.
        name: one of `AGGREGATIONS`.

    Returns:
        candidate_scores (N, B) float32, NaN for a candidate with no tokens; best_index (B) int64, -1 for no winner.
    """
    real = mask > 0
    ends = real & (np.broadcast_to(step_mask, mask.shape) > 0)
    candidate_scores = np.full(mask.shape[:2], np.nan, np.float32)
    for n, b in np.ndindex(candidate_scores.shape):
        if real[n, b].any():
            # Without the end of a step only the last token is read.
            places = np.flatnonzero(ends[n, b]) if ends[n, b].any() else np.flatnonzero(real[n, b])[-1:]
            candidate_scores[n, b] = _READ[name](scores[n, b, places])
    return candidate_scores, best_of_n(candidate_scores)


def aggregate_tokens(
    scores: Array, mask: Array, tokens: Array, step_token: int | None, aggregation: str
) -> tuple[Array, int]:
    """Scores of the candidates of one prompt, and the best index, -1 for no winner; steps end at the step token.

    Args:
        scores: (N, T) float32.
        mask: (N, T), above 0 where a token is real.
        tokens: (N, T) int64.
        step_token: ends a step, for the step forms.
        aggregation: one of `AGGREGATIONS`, or its step form.

    Returns:
        candidate_scores (N,) float32, NaN for a candidate with no tokens, and the index.
    """
    steps = tokens == step_token if is_stepwise(aggregation) else mask
    rated, best = aggregate(scores[:, None], mask[:, None], steps[:, None], aggregation.removeprefix("step_"))
    return rated[:, 0], int(best[0])


def best_of_n(candidate_scores: Array) -> Array:
    """(N, B) -> (B) int64: the index of the maximum, ties to the lowest index, NaN never, -1 when nothing can win."""
    usable = ~np.isnan(candidate_scores)
    best = np.where(usable, candidate_scores, -np.inf)
    winners = usable & (best == best.max(axis=0))
    return np.where(usable.any(axis=0), winners.argmax(axis=0), -1).astype(np.int64)


def elect(candidate_scores: Array, answer_ids: Array, vote: str, vote_weight: str = "score") -> tuple[Array, Array]:
    """The winners of a vote.

    Args:
        candidate_scores: (N, B) float32.
        answer_ids: broadcastable to (N, B), int64, equal for equal answers; below 0 where no answer was found.
        vote: one of `VOTES`.
        vote_weight: of `Scoring`: what a candidate adds to its answer in a weighted vote.

    Returns:
        best_index (B) int64, -1 for no winner; group_scores (N, B) float32: the sum of weights or the count of each
        candidate's answer, NaN for one that cannot win; where there is no vote or no voter, each candidate's own score.
    """
    best, groups = best_of_n(candidate_scores), candidate_scores.copy()
    ids = np.broadcast_to(answer_ids, candidate_scores.shape)
    for b, (column, answers) in enumerate(zip(candidate_scores.T, ids.T, strict=True)):
        voters = [n for n, score in enumerate(column) if answers[n] >= 0 and not np.isnan(score)]
        if vote == "score" or not voters:
            continue
        groups[:, b] = np.nan
        weights = np.ones(len(column))
        if vote == "weighted":
            weights = column.astype(float)
            if vote_weight == "softmax":
                weights[voters] = _softmax(column[voters])
        for n in voters:
            groups[n, b] = sum(weights[m] for m in voters if answers[m] == answers[n])
        leader = int(best_of_n(groups[:, b : b + 1])[0])
        together = (answers == answers[leader]) & ~np.isnan(groups[:, b])
        best[b] = best_of_n(np.where(together, column, np.nan)[:, None])[0]
    return best, groups


def _softmax(scores: Array) -> Array:
    """Shares (n,) float32 of scores (n,) float32; the maxima share all of it if they are infinite."""
    behind = np.where(scores == scores.max(), np.float32(0), scores - scores.max())
    weights = np.exp(behind.astype(np.float64))
    shares: Array = (weights / weights.sum()).astype(np.float32)
    return shares

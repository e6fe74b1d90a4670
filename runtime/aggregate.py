"""The selection in NumPy: what the graphs do, written a second time for test doubles and checks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .session import Array

__all__ = ["aggregate", "best_of_n"]

_READ: dict[str, Callable[[Array], float]] = {
    "last": lambda x: float(x[-1]),
    "mean": lambda x: float(x.mean(dtype=np.float64)),
    "min": lambda x: float(x.min()),
    "max": lambda x: float(x.max()),
    "prod": lambda x: float(x.prod(dtype=np.float64)),
}


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
    found = np.full(mask.shape[:2], np.nan, np.float32)
    for n, b in np.ndindex(found.shape):
        if real[n, b].any():
            # Without an end of a step the last token is all that is read.
            places = np.flatnonzero(ends[n, b]) if ends[n, b].any() else np.flatnonzero(real[n, b])[-1:]
            found[n, b] = _READ[name](scores[n, b, places])
    return found, best_of_n(found)


def best_of_n(candidate_scores: Array) -> Array:
    """(N, B) -> (B) int64: the greatest, ties to the lowest index, NaN never, -1 when nothing can win."""
    usable = ~np.isnan(candidate_scores)
    best = np.where(usable, candidate_scores, -np.inf)
    winners = usable & (best == best.max(axis=0))
    return np.where(usable.any(axis=0), winners.argmax(axis=0), -1).astype(np.int64)

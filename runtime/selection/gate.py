"""A gated scorer in NumPy: where its gate reads, and the objectives that it weighs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import Array
from ..artifact.manifest import Scoring
from .aggregate import aggregate

__all__ = ["last_header", "objectives_by_name"]


def last_header(tokens: Array, header: Sequence[int]) -> int:
    """Return where the last header begins in tokens (T,) int64, or -1."""
    places = len(tokens) - len(header) + 1
    if places <= 0:
        return -1
    begins = np.logical_and.reduce([tokens[i : i + places] == token for i, token in enumerate(header)])
    found = np.flatnonzero(begins)
    return int(found[-1]) if len(found) else -1


def objectives_by_name(
    scoring: Scoring, values: Array, mask: Array, steps: Array, aggregation: str
) -> dict[str, Array]:
    """Aggregate the objectives of tokens as their scores are.

    Args:
        scoring: names the objectives.
        values: of every token, (N, T, objectives) float32.
        mask: (N, T) int64, above 0 where a token is real.
        steps: where the aggregation may read, broadcastable to (N, T).
        aggregation: as in `Scoring`.

    Returns:
        for each name (N,) float32.
    """
    by_objective = values.transpose(0, 2, 1)
    each = np.broadcast_to(mask[:, None], by_objective.shape)
    scores, _ = aggregate(by_objective, each, steps[:, None], aggregation.removeprefix("step_"))
    return dict(zip(scoring.labels, scores.T, strict=True))

"""The choice of the winner among candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import Array
from ..selection.aggregate import elect

__all__ = ["choose", "choose_in_chains"]


def choose(scores: Array, ids: Array, vote: str, vote_weight: str) -> tuple[int, Array]:
    """The winner by score, or by a vote of answers: scores (n,) float32, answer ids (n,) int64, below 0 for none.

    `vote_weight` is that of `Scoring`.

    Returns:
        its index, -1 if nothing can win, and each candidate's group score (n,).
    """
    best, groups = elect(scores[:, None], ids[:, None], vote, vote_weight)
    return int(best[0]), groups[:, 0]


def choose_in_chains(
    scores: Array, ids: Array, vote: str, vote_weight: str, chains: Sequence[int]
) -> tuple[int, Array]:
    """A vote within each chain, then one among the chains' winners (Snell et al., 2024, section 6)."""
    if vote != "weighted":
        # Within a chain there are too few for a majority, and the best of the best is the best.
        return choose(scores, ids, vote, vote_weight)
    winners = []
    for chain in dict.fromkeys(chains):
        members = np.flatnonzero(np.array(chains) == chain)
        index, _ = choose(scores[members], ids[members], vote, vote_weight)
        if index >= 0:
            winners.append(int(members[index]))
    groups = np.full(len(scores), np.nan, np.float32)
    if not winners:
        return -1, groups
    index, groups[winners] = choose(scores[winners], ids[winners], vote, vote_weight)
    return winners[index], groups

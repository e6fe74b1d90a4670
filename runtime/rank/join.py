"""One ranking from the rankings of the same prompt's candidates, which came at different times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..selection.vote import Ballot
from ..text.reader import Item
from .result import Ranking, winner

__all__ = ["join_rankings"]


def join_rankings(
    parts: Sequence[tuple[Sequence[int], Ranking]], candidates: Sequence[Item], ballot: Ballot
) -> Ranking:
    """The ranking of all candidates together; scores do not depend on which candidates were ranked together.

    Args:
        parts: the numbers of some candidates, and their ranking, by score. A candidate that no part has cannot win.
        candidates: all of them.
        ballot: how they vote.

    Raises:
        NoWinnerError: every score is NaN.
    """
    count = len(candidates)
    totals = np.full(count, np.nan, np.float32)
    scores = [np.zeros(0, np.float32) for _ in range(count)]
    steps: list[np.ndarray] = [np.zeros(0, np.float32) for _ in range(count)]
    unreadable: dict[int, str] = {}
    objectives: dict[str, np.ndarray] = {}
    for numbers, part in parts:
        for place, number in enumerate(numbers):
            totals[number], scores[number] = part.candidate_scores[place], part.scores[place]
            if part.step_scores is not None:
                steps[number] = part.step_scores[place]
            for name, values in (part.objectives or {}).items():
                objectives.setdefault(name, np.full(count, np.nan, np.float32))[number] = values[place]
            if place in part.unreadable:
                unreadable[number] = part.unreadable[place]
    chosen, groups = ballot.choose(totals)
    best = winner(chosen, "candidates")
    first = parts[0][1]
    return Ranking(
        best,
        candidates[best],
        totals,
        scores,
        first.aggregation,
        *ballot.count(totals, groups),
        None if first.step_scores is None else steps,
        first.cut,
        unreadable,
        None if first.objectives is None else objectives,
    )

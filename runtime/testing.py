"""A stand-in for a model, for the tests of programs that use bonnx: no artifact, no ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .aggregate import aggregate
from .errors import InputError
from .inputs import Item, aggregation_code, check_some, is_stepwise
from .model import Ranking, winner

__all__ = ["FakeModel"]


class FakeModel:
    """Ranks with a function of your own, by the same rules as a real model.

    Args:
        score: takes a prompt and a candidate and gives one score for each token, or a single number.
        aggregation: used when `rank` is not told.

    Example:
        >>> model = FakeModel(lambda prompt, candidate: len(candidate))
        >>> model.rank("2+2=", ["4", "four"]).best
        'four'
    """

    provider = "fake"

    def __init__(self, score: Callable[[Item, Item], float | Sequence[float]], *, aggregation: str = "last") -> None:
        aggregation_code(aggregation)
        self._score, self._aggregation = score, aggregation

    def rank(
        self,
        prompt: Item,
        candidates: Sequence[Item],
        *,
        aggregation: str | None = None,
        step_masks: Sequence[Sequence[int]] | None = None,
        partial: bool = False,
    ) -> Ranking:
        """As `Model.rank`; `partial` changes nothing.

        Raises:
            InputError: nothing to rank, an unknown aggregation, or a step aggregation without step_masks.
            NoWinnerError: every score is NaN.
        """
        name = aggregation or self._aggregation
        aggregation_code(name)
        check_some(candidates, "candidates")
        if is_stepwise(name) and step_masks is None:
            raise InputError("a step aggregation needs step_masks here: a fake model has no step token")
        scores = [np.atleast_1d(np.asarray(self._score(prompt, c), np.float32)) for c in candidates]
        longest = max(map(len, scores))
        padded, mask, steps = (np.zeros((len(scores), 1, longest), kind) for kind in (np.float32, np.int64, np.int64))
        for i, row in enumerate(scores):
            padded[i, 0, : len(row)], mask[i, 0, : len(row)] = row, 1
            marks = step_masks[i] if is_stepwise(name) and step_masks is not None else [1] * len(row)
            steps[i, 0, : len(marks)] = marks
        found, best = aggregate(padded, mask, steps, name.removeprefix("step_"))
        index = winner(int(best[0]), "candidates")
        return Ranking(index, candidates[index], found[:, 0], scores, name)

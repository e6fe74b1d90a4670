"""Verify the aggregations and votes of an exported folder against NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from bonnx.errors import ExportError
from bonnx.runtime.artifact.manifest import AGGREGATIONS, VOTES
from bonnx.runtime.selection.aggregate import aggregate, elect

from .parity import Array, Case, Checker

__all__ = ["selection_cases"]


def selection_cases(checker: Checker) -> list[Case]:
    """Return cases for every aggregation, with and without steps, and every vote; all ragged, with empty candidates."""
    return [*_aggregations(checker), *_votes(checker)]


def _aggregations(checker: Checker) -> Iterator[Case]:
    for code, name in enumerate(AGGREGATIONS):
        for stepwise in (False, True):
            feeds = checker.inputs.random_feeds(4, 9, 6, 3)
            feeds["candidate_mask"][checker.rng.integers(6), 0] = 0
            feeds["aggregation"] = np.array(code)
            if stepwise:
                feeds["step_mask"] = checker.rng.integers(0, 2, feeds["candidate_mask"].shape)
            judge = partial(_judge_aggregation, checker, name, feeds)
            yield Case("selection, all aggregations", "rank", feeds, judge)


def _judge_aggregation(checker: Checker, name: str, feeds: dict[str, Array], outputs: dict[str, Array]) -> float:
    expected, best = aggregate(outputs["scores"], feeds["candidate_mask"], feeds["step_mask"], name)
    if not np.array_equal(outputs["best_index"], best):
        raise ExportError(f"selection {name}: the graph selected {outputs['best_index']}; expected {best}")
    return checker.compare(f"selection {name}", outputs["candidate_scores"], expected)


def _votes(checker: Checker) -> Iterator[Case]:
    """Yield cases in which none, some or all candidates have answers, with answer ids of any size."""
    for code, name in enumerate(VOTES):
        for answered in (0.7,) if checker.quick else (0.0, 1.0, 0.7):
            feeds = checker.inputs.random_feeds(3, 5, 7, 3)
            feeds["candidate_mask"][checker.rng.integers(7), 0] = 0
            ids = checker.rng.integers(0, 2**62, 3)[checker.rng.integers(3, size=(7, 3))]
            feeds["answer_ids"] = np.where(checker.rng.random(ids.shape) < answered, ids, -ids - 1)
            feeds["vote"] = np.array(code)
            yield Case("selection, all votes", "rank", feeds, partial(_judge_vote, checker, name, feeds, answered))


def _judge_vote(
    checker: Checker, name: str, feeds: dict[str, Array], answered: float, outputs: dict[str, Array]
) -> float:
    best, groups = elect(outputs["candidate_scores"], feeds["answer_ids"], name, checker.scoring.vote_weight)
    if not np.array_equal(outputs["best_index"], best):
        raise ExportError(f"vote {name}: the graph selected {outputs['best_index']}; expected {best}")
    if name == VOTES[-1] and answered == 0.7:
        # Counts are the same on every machine, whatever the last digits of the scores.
        checker.record(f"rank/{name}", feeds, outputs)
    return checker.compare(f"vote {name}", outputs["group_scores"], groups)

"""A scorer of the caller's own in place of the model's."""

import math
from collections import Counter

import numpy as np
import pytest

from bonnx import InputError, NoWinnerError
from tests.runtime.search.obvious import first, policy_of, run, sequences
from tests.runtime.search.tabular import PROMPT


def test_the_callers_scorer_takes_the_place_of_the_models(table):
    seen = []

    def longest(ids):
        seen.append(list(ids))
        return len(ids)

    result = run(table, "best_of_n", 10, scorer=longest)
    assert [c.score for c in result.candidates] == [len(PROMPT) + len(s) for s in sequences(result)]
    assert seen[0] == [*PROMPT, *sequences(result)[0]]
    assert result.cost.scored_tokens == sum(map(len, seen))
    beam = run(table, "beam", 16, width=4, scorer=lambda ids: -len(ids))
    assert all(node.score == -(len(PROMPT) + _depth(beam.nodes, i)) for i, node in enumerate(beam.nodes))


@pytest.mark.parametrize("method", ["weighted", "adaptive", "pruned", "beam", "dvts"])
def test_a_scorers_numbers_are_weights_of_a_vote(table, method):
    options = {"answers": first, "vote": "weighted"}
    asked = []

    def below(ids):
        asked.append(ids)
        return -0.5

    with pytest.raises(InputError, match=r"scorer, for \[1, 2.*: in a weighted vote .* expected 0 or more, got -0.5"):
        run(table, method, 16, scorer=below, **options)
    assert len(asked) == 1
    with pytest.raises(InputError, match=r"expected 0 or more, got -0\.5"):
        run(table, "best_of_n", 8, policy=policy_of(method), scorer=below, **options)
    if method != "weighted":
        assert run(table, method, 16, scorer=below).best_index >= 0
        assert run(table, method, 16, scorer=below, answers=first, vote="majority").best_index >= 0
    found = run(table, method, 16, scorer=lambda ids: 2.0, **options)
    counts = Counter(answer for answer in found.answers if answer is not None)
    rated = [c.finish_reason != "pruned" for c in found.candidates]
    if all(rated) and counts:
        for answer, group in zip(found.answers, found.group_scores, strict=True):
            assert np.isnan(group) if answer is None else group == 2 * counts[answer]


@pytest.mark.parametrize("method", ["best_of_n", "adaptive", "pruned", "beam", "lookahead", "dvts"])
def test_a_scorer_is_asked_once_for_what_is_judged(table, method):
    asked = []

    def scorer(ids):
        asked.append(tuple(ids))
        return 0.01 * (sum(ids) % 89)

    result = run(table, method, 16, scorer=scorer, **({"every": 3} if method == "pruned" else {}))
    judged = len(result.nodes)
    if method == "pruned":
        # At each pruning those in the race, and in the end everyone.
        assert len(asked) <= judged * (1 + table.longest // 3)
    else:
        assert len(asked) == judged


def _depth(nodes, i):
    return len(nodes[i].tokens) + (0 if nodes[i].parent is None else _depth(nodes, nodes[i].parent))


def test_a_scorer_that_fails_says_so_and_nan_never_wins(table):
    def broken(ids):
        raise ZeroDivisionError("no such thing")

    with pytest.raises(InputError, match="it raised ZeroDivisionError: no such thing"):
        run(table, "beam", 8, scorer=broken)
    best = run(table, "best_of_n", 8).best_index
    wanted = sequences(run(table, "best_of_n", 8))[best]
    others = run(table, "best_of_n", 8, scorer=lambda ids: math.nan if tuple(ids[2:]) == wanted else 1.0)
    assert sequences(others)[others.best_index] != wanted
    with pytest.raises(NoWinnerError):
        run(table, "beam", 8, scorer=lambda ids: math.nan)

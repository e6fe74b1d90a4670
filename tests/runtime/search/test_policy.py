"""A policy chooses the method, and the completions by which it judges the prompt are not wasted."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from bonnx import InputError
from bonnx.runtime.search import Choice, Policy
from tests.runtime.search.obvious import METHODS_OF_TREES, Reference, first, policy_of, run, sequences
from tests.runtime.search.tabular import PROMPT


@pytest.mark.parametrize("method", METHODS_OF_TREES)
@pytest.mark.parametrize("probe", [0, 3, 8, 11])
def test_no_random_number_is_used_twice(table, method, probe):
    """Of each of a stream's numbers one token is drawn, whether a policy looked at the prompt first or not."""
    used, plain = Counter(), table.draw

    def draw(prefix, number, temperature=1.0):
        used[number, len(prefix)] += temperature > 0
        return plain(prefix, number, temperature)

    table.draw = draw
    options = METHODS_OF_TREES[method]
    if probe:
        result = run(table, "best_of_n", 8, policy=policy_of(method, options, probe))
        assert result.method == method
    else:
        result = run(table, method, 8, **options)
    assert max(used.values()) == 1
    assert result.cost.prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("method", ["best_of_n", "self_certainty", "adaptive"])
def test_a_policys_samples_are_the_first_of_a_method_that_samples(table, method):
    result = run(table, "best_of_n", 8, policy=policy_of(method, METHODS_OF_TREES[method]))
    assert sequences(result) == [Reference(table).whole((), number) for number in range(8)]
    assert result.options["budget"] == 8


def test_a_policys_samples_may_be_all_that_a_method_needs(table):
    expected = [Reference(table).whole((), number) for number in range(4)]
    result = run(table, "best_of_n", 8, policy=policy_of("adaptive", {"price": 1e9}))
    assert sequences(result) == expected
    assert result.cost.sampled_tokens == sum(map(len, expected))


def test_a_majority_counts_each_of_a_policys_samples_once(table):
    expected = [Reference(table).whole((), number) for number in range(8)]
    result = run(table, "best_of_n", 8, policy=policy_of("majority"), answers=first)
    assert sequences(result) == expected
    counts = Counter(first(sequence) for sequence in expected)
    if set(counts) == {None}:
        # Nobody votes, so each candidate stands for itself.
        assert np.array_equal(result.group_scores, [c.score for c in result.candidates])
        return
    for answer, group in zip(result.answers, result.group_scores, strict=True):
        assert np.isnan(group) if answer is None else group == counts[answer]


def test_beside_a_search_a_policys_samples_stand_for_themselves(table):
    reference = Reference(table)
    probed = [reference.whole((), reference.number()) for _ in range(4)]
    result = run(table, "best_of_n", 8, policy=policy_of("beam", {"width": 2}))
    assert sequences(result) == [*probed, *reference.beam([8], 2)]
    assert result.cost.sampled_tokens == reference.sampled
    reference = Reference(table)
    probed = [reference.whole((), reference.number()) for _ in range(4)]
    result = run(table, "best_of_n", 8, policy=policy_of("pruned", {"every": 3}))
    others = [reference.whole((), reference.number()) for _ in range(8)]
    assert sequences(result)[:4] == probed
    assert all(b[: len(a)] == a for a, b in zip(sequences(result)[4:], others, strict=True))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("bean", {}), "did you mean 'beam'"),
        (("beam", {"width": 0}), "width: expected"),
        (("best_of_n", {"temperature": 2}), "a policy does not say how to sample"),
        (("majority", {}), "needs answers"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_before_anything_is_computed(table, choice, message):
    policy = Policy(1, "table", "0" * 64, 4, [0.5], {"8": [Choice("best_of_n", {}), Choice(*choice)]})
    with pytest.raises(InputError, match=message):
        run(table, "best_of_n", 8, policy=policy)
    assert table.computed == 0


def test_a_prompt_that_cannot_be_rated_is_hard(table):
    policy = Policy(1, "table", "0" * 64, 2, [0.5], {"4": [Choice("best_of_n", {}), Choice("beam", {"width": 2})]})
    rated = iter([math.nan, math.nan])
    result = run(table, "best_of_n", 4, policy=policy, scorer=lambda ids: next(rated, 1.0))
    assert (result.method, result.policy["bin"]) == ("beam", 2)
    told = result.to_record(PROMPT, lambda tokens: [str(token) for token in tokens])
    assert json.loads(json.dumps(told, allow_nan=False))["policy"]["mean_score"] is None

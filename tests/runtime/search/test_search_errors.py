"""What a search refuses, before anything is computed."""

import math

import pytest

from bonnx import InputError
from tests.runtime.search.obvious import run


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("bean", {}, "did you mean 'beam'"),
        ("beam", {"widht": 3}, "did you mean 'width'"),
        ("beam", {"width": 0}, "width: expected a whole number"),
        ("beam", {"width": 9}, "a width of 9 needs at least 9 beams, a budget of 9 completions; got 8"),
        ("beam", {"rounds": 0}, "rounds: expected"),
        ("lookahead", {"steps": 8}, "8 is less than one beam that looks 8 steps ahead"),
        ("dvts", {"width": 9}, "needs at least 9 beams"),
        ("majority", {}, "needs answers"),
        ("self_certainty", {"vote": "score"}, "votes by its own rule"),
        ("self_certainty", {"power": -1}, "power: expected"),
        ("self_certainty", {"power": math.inf}, "power: expected"),
        ("adaptive", {"price": 0}, "price: expected"),
        ("adaptive", {"price": "dear"}, "price: expected a number above 0; got 'dear'"),
        ("adaptive", {"ceiling": math.nan}, "ceiling: expected a finite number; got nan"),
        ("adaptive", {"ceiling": 10**400}, "ceiling: expected"),
        ("adaptive", {"confidence": 1.0}, "confidence: expected"),
        ("adaptive", {"rule": "leader"}, "needs a vote"),
        ("adaptive", {"rule": "x"}, "rule: expected"),
        ("pruned", {"keep": 0}, "keep: expected"),
        ("pruned", {"keep": None}, "keep: expected a number above 0"),
        ("revisions", {"chains": 9}, "8 attempts are fewer than 9 chains"),
        ("revisions", {"memory": 40}, "leave no room"),
        ("best_of_n", {"temperature": -1}, "temperature: expected"),
        ("best_of_n", {"answers": ["a", "b"]}, "there are no candidates yet"),
        ("best_of_n", {"deadline": 0}, "deadline: expected"),
        ("best_of_n", {"policy": "nowhere.json"}, "cannot be read"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(table, method, options, message):
    with pytest.raises(InputError, match=message):
        run(table, method, 8, **options)
    assert table.computed == 0


@pytest.mark.parametrize("budget", [0, -1, 2.5, True, 10**9])
def test_a_budget_is_a_whole_number_within_limits(table, budget):
    with pytest.raises(InputError, match=r"budget: expected|candidates: this artifact takes"):
        run(table, "best_of_n", budget)

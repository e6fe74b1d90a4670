"""Results as JSON, as text, beside each other, and in a notebook."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bonnx import Candidate, Check, FakeModel, Generation, Scored
from bonnx.runtime.results import same, to_json
from bonnx.runtime.search.result import Cost, Node, SearchResult

MODEL = FakeModel(lambda prompt, candidate: [0.25, float(len(candidate))], lambda prompt, i: "<b>" + "x" * i)


def scored():
    scores = [np.array([0.5], np.float32), np.array([], np.float32)]
    return Scored(0, np.array([0.5, np.nan], np.float32), scores, None, "mean", (0, 1), None, None, None, {1: "empty"})


def searched():
    found = MODEL.generate("p", n=2)
    node = Node(None, [1], [math.nan], math.nan, 0, "kept")
    groups = np.array([0.5, np.nan], np.float32)
    return SearchResult("beam", {"width": 4}, 1, found.candidates, "weighted", ("7", None), groups, Cost(), [node], [0])


RESULTS = {
    "ranking": lambda: MODEL.rank("2+2=", ["4", "four", ""]),
    "vote": lambda: MODEL.rank("2+2=", ["4", "four", "5"], vote="majority", answers=["4", "4", None]),
    "scored": scored,
    "generation": lambda: MODEL.generate("p", n=3),
    "candidate": lambda: MODEL.generate("p").best,
    "search": searched,
    "check": lambda: Check("rank/0", 1e-6, [0, 1]),
}
each_result = pytest.mark.parametrize("make", RESULTS.values(), ids=RESULTS)


def test_a_ranking_is_json_a_line_a_value_and_a_table():
    ranking = MODEL.rank("2+2=", ["4", "four", ""])
    assert ranking.to_dict() == {
        "best_index": 1,
        "best": "four",
        "candidate_scores": [1.0, 4.0, None],
        "scores": [[0.25, 1.0], [0.25, 4.0], []],
        "aggregation": "last",
        "order": [1, 0, 2],
        "margin": 3.0,
        "unreadable": {"2": ranking.unreadable[2]},
    }
    assert repr(ranking) == (
        "Ranking(best_index=1, best='four', candidate_scores=[1, 4, nan], margin=3, aggregation='last')"
    )
    assert ranking == MODEL.rank("2+2=", ["4", "four", ""]) != MODEL.rank("2+2=", ["4", "four", "5"])
    assert ranking._repr_html_().count("<tr>") == 4


@each_result
def test_every_result_is_json_without_nan(make):
    found = make().to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@each_result
def test_every_result_equals_its_like_and_nothing_else(make):
    result = make()
    assert result == make()
    assert result != make().to_dict()
    for field in dataclasses.fields(result):
        assert result != dataclasses.replace(result, **{field.name: object()})
    with pytest.raises(TypeError, match="unhashable"):
        hash(result)


@each_result
def test_every_repr_is_short_however_much_there_is(make):
    many = dataclasses.replace(make(), **{name: ["long" * 99] * 99 for name in vars(make()) if name == "answers"})
    assert len(repr(many)) <= 400
    assert "\n" not in repr(many)


@each_result
def test_every_table_escapes_what_it_shows(make):
    table = make()._repr_html_()
    assert table.startswith("<table><tr><th>")
    assert "<b>" not in table
    assert table.count("<tr>") > 1


def test_the_winner_stands_out_and_long_tables_end():
    table = MODEL.generate("p", n=150)._repr_html_()
    assert table.count("<tr>") == 101
    assert "50 more rows" in table
    assert "<th style='text-align: left'>&lt;b&gt;xx</th>" in MODEL.generate("p", n=3)._repr_html_()


def test_a_generation_shows_no_best_while_nothing_can_win():
    best = Candidate("a", np.zeros(1, np.int64), np.zeros(1, np.float32), np.zeros(1, np.float32), math.nan, None)
    assert "best=" not in repr(Generation(-1, [best], 1, 1, "last"))
    assert "best=Candidate(text='a', score=nan, tokens=[0], finish_reason=None)" in repr(
        Generation(0, [best], 1, 1, "last")
    )


@given(arrays.arrays(st.sampled_from([np.float32, np.float64, np.int64, bool]), arrays.array_shapes(min_side=0)))
def test_an_array_equals_its_copy_and_is_json(array):
    assert same(array, array.copy())
    assert not same(array, array.tolist())
    assert not same(array, array.astype(np.complex128))
    finite = np.where(np.isfinite(array), array, None) if array.dtype.kind == "f" else array
    assert json.loads(json.dumps(to_json(array), allow_nan=False)) == finite.tolist()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (-math.inf, None),
        (np.float32(0.5), 0.5),
        ((1, "a", None, True), [1, "a", None, True]),
        ({1: math.nan}, {"1": None}),
        (Cost(3), {"prompt_tokens": 3, "sampled_tokens": 0, "computed_tokens": 0, "scored_tokens": 0, "seconds": 0.0}),
        (1 + 2j, "(1+2j)"),
    ],
    ids=["nan", "infinity", "numpy", "tuple", "mapping", "dataclass", "anything"],
)
def test_a_value_becomes_json(value, expected):
    assert to_json(value) == expected

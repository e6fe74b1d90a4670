"""Candidates that vote by the tools that they call."""

import json

import pytest

import bonnx
from bonnx.errors import InputError
from bonnx.runtime.selection.tool_calls import tool_answer, tool_extractor


def calling(*calls):
    """A candidate that calls these tools, with arguments as text, as OpenAI's API has them."""
    tools = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return [{"role": "assistant", "content": None, "tool_calls": tools}]


def test_candidates_vote_by_their_calls():
    candidates = [
        calling(("add", '{"a": 1, "b": 2}')),
        calling(("add", '{"a": 1, "b": 3}')),
        calling(("add", '{"b": 2.0, "a": 1}')),
        "It is 3.",
    ]
    model = bonnx.FakeModel(lambda prompt, candidate: candidates.index(candidate))
    ranking = model.rank("1 + 2", candidates, vote="majority", answers="tool")
    assert ranking.best_index == 2, "the better one of the two that agree"
    assert ranking.answers[0] == ranking.answers[2] != ranking.answers[1]
    assert ranking.answers[3] is None


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (calling(("f", '{"x": [1, 2]}')), calling(("f", '{ "x":[1.0,2] }')), True),
        (calling(("f", '{"x": [1, 2]}')), calling(("f", '{"x": [2, 1]}')), False),
        (calling(("f", "{}")), calling(("g", "{}")), False),
        (calling(("f", "{}"), ("g", "{}")), calling(("f", "{}")), False),
        (calling(("f", "not json ")), calling(("f", "not json")), True),
        (calling(("f", '{"x": true}')), calling(("f", '{"x": 1}')), False),
        (calling(("f", '{"x": {"b": 1, "a": 2}}')), calling(("f", '{"x": {"a": 2, "b": 1}}')), True),
    ],
    ids=["numbers", "order of a list", "names", "two calls", "not JSON", "true", "nested keys"],
)
def test_equal_calls(left, right, equal):
    assert (tool_answer(left) == tool_answer(right)) == equal


def test_arguments_that_do_not_count():
    extract = tool_extractor("tool-except:id, time")
    left, right = ({"a": 1, "id": i, "time": str(i)} for i in range(2))
    assert extract(calling(("f", json.dumps(left)))) == extract(calling(("f", json.dumps(right))))
    assert extract(calling(("f", json.dumps(left)))) != extract(calling(("f", json.dumps(right | {"a": 2}))))


@pytest.mark.parametrize("candidate", ["text", [], [{"role": "assistant", "content": "x"}], None, [1, 2]], ids=repr)
def test_what_calls_nothing_has_no_answer(candidate):
    assert tool_answer(candidate) is None


@pytest.mark.parametrize("name", ["tool-except:", "tool-except:a,,b", "tools"])
def test_names_that_are_none(name):
    model = bonnx.FakeModel(lambda prompt, candidate: 1.0)
    with pytest.raises(InputError, match="tool-except"):
        model.rank("x", ["y"], vote="majority", answers=name)


def test_arguments_nested_without_end_are_no_answer():
    for depth in (500, 900, 5000, 200_000):
        answer = tool_answer(calling(("f", "[" * depth + "]" * depth)))
        assert answer is None or "f" in answer

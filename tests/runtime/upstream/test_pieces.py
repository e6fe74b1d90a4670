"""Messages in pieces, and usage, as different servers send them."""

import json

import pytest

from bonnx.runtime.upstream.cost import SamplingCost
from tests.runtime.upstream import fake
from tests.runtime.upstream.arrivals import CHAT, collect, texts
from tests.runtime.upstream.fake import FakeUpstream


def test_tool_calls_come_in_pieces():
    def piece(**delta):
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}

    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}
    rest = {"index": 0, "function": {"arguments": '{"a": 6}'}}
    chunks = [
        piece(role="assistant", content=None, reasoning_content="let "),
        piece(reasoning_content="me"),
        piece(tool_calls=[call]),
        piece(tool_calls=[rest]),
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    ]
    with FakeUpstream(fake.events(*chunks, "data: [DONE]\n\n")) as upstream:
        (completion,) = collect(upstream.url, CHAT, 1)
    function = {"name": "add", "arguments": '{"a": 6}'}
    assert completion.message == {
        "role": "assistant",
        "reasoning_content": "let me",
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    assert completion.item == [completion.message]
    assert completion.finish_reason == "tool_calls"


def _chunk(reason=None, **delta):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def _call(name, arguments="{}", **fields):
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | fields


@pytest.mark.parametrize(
    "pieces",
    [
        [[_call("a", id="1")], [_call("b", id="2")]],
        [[_call("a", id="1"), _call("b", id="2")]],
        [[_call("a", id="1", index=0)], [_call("b", id="2", index=0)]],
        [[_call("a", id="1", index=None)], [_call("b", id="2", index=None)]],
        [[_call("a", id="1", index="0")], [_call("b", id="2", index="1")]],
        [[_call("a", "{", id="1")], [{"function": {"arguments": "}"}}], [_call("b", id="2")]],
        [[_call("a", "{", id="1", index=0)], [_call("a", "}", index=0)], [_call("b", id="2", index=9_000_000)]],
    ],
    ids=["no index", "whole", "one index", "null", "text", "pieces", "the name again, and a large index"],
)
def test_tool_calls_that_are_numbered_badly(pieces):
    chunks = [_chunk(tool_calls=calls) for calls in pieces]
    with FakeUpstream(fake.events(*chunks, _chunk("tool_calls"))) as upstream:
        (completion,) = collect(upstream.url, CHAT, 1)
    assert completion.message["tool_calls"] == [_call("a", id="1"), _call("b", id="2")]


def test_a_message_in_unusual_pieces():
    """Parts instead of a text, a refusal in pieces, separators of lines that are none in events, an empty reason."""
    parts = [{"type": "text", "text": "a\u2028b"}, {"type": "image"}]
    chunks = [_chunk("", content=parts, refusal="I "), _chunk("", content="\x85c", refusal="cannot", audio={"x": 1})]
    lines = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks]
    with FakeUpstream(fake.events(*lines, _chunk("stop"))) as upstream:
        (completion,) = collect(upstream.url, CHAT, 1)
    assert completion.text == completion.message["content"] == "a\u2028b\x85c"
    assert completion.message["refusal"] == "I cannot"
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize(
    ("usages", "counted"),
    [
        ([{}], (None, None)),
        ([None], (None, None)),
        (["many"], (None, None)),
        ([{"prompt_tokens": None, "completion_tokens": None}], (None, None)),
        ([{"prompt_tokens": 5.0, "completion_tokens": 2.0}], (5, 2)),
        ([{"prompt_tokens": 5}], (5, 0)),
        ([{"prompt_tokens": 5, "completion_tokens": count} for count in (1, 2, 3)], (5, 3)),
    ],
    ids=["empty", "null", "text", "nulls", "floats", "no completions", "in every chunk"],
)
def test_usage_as_servers_count_it(usages, counted):
    cost = SamplingCost()
    chunks = [_chunk(content="a") | {"usage": usage} for usage in usages]
    with FakeUpstream(fake.events(*chunks, _chunk("stop"), {"choices": None})) as upstream:
        assert texts(collect(upstream.url, CHAT, 1, cost=cost)) == ["a" * len(usages)]
    assert (cost.prompt_tokens, cost.completion_tokens) == counted

"""A single completion is sent as it comes, from the artifact and from an upstream."""

import asyncio
import json
import threading

import openai
import pytest

from tests.runtime.upstream import fake

PUZZLE = "3,7,20,24>1:"
CHAT = [{"role": "user", "content": PUZZLE}]
ONE = {"best_of": 1}


@pytest.fixture(scope="module")
def engine(chat_engine):
    return chat_engine


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def text_of(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_the_artifact_sends_tokens_as_they_come(client):
    request = {"model": "countdown", "messages": CHAT, "seed": 1, "logprobs": True, "extra_body": ONE}
    whole = client.chat.completions.create(**request)
    chunks = [*client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})]
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].bonnx["scores"] == pytest.approx(whole.bonnx["scores"], abs=1e-5)
    tokens = [
        t for chunk in chunks if chunk.choices and chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content
    ]
    assert [t.token for t in tokens] == [t.token for t in whole.choices[0].logprobs.content]
    assert [t.logprob for t in tokens] == pytest.approx(
        [t.logprob for t in whole.choices[0].logprobs.content], abs=1e-4
    )
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_most_likely_tokens(client):
    """Whole and streamed, as a message and as text; the drawn token is among those of a text."""
    chat = {"model": "countdown", "messages": CHAT, "seed": 1, "extra_body": ONE, "logprobs": True, "top_logprobs": 3}
    entries = client.chat.completions.create(**chat).choices[0].logprobs.content
    chunks = [*client.chat.completions.create(**chat, stream=True)]
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [[top.token for top in entry.top_logprobs] for entry in streamed] == [
        [top.token for top in entry.top_logprobs] for entry in entries
    ]
    assert {len(entry.top_logprobs) for entry in entries} == {3}
    for entry in entries:
        known = {top.token: top.logprob for top in entry.top_logprobs}
        assert known.get(entry.token, entry.logprob) == pytest.approx(entry.logprob, abs=1e-4)
    text = client.completions.create(model="countdown", prompt=PUZZLE, seed=1, extra_body=ONE, logprobs=5)
    probabilities = text.choices[0].logprobs
    assert [entry.token for entry in entries] == probabilities.tokens
    assert all(len(top) in (5, 6) for top in probabilities.top_logprobs)
    assert all(token in top for token, top in zip(probabilities.tokens, probabilities.top_logprobs, strict=True))
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        client.chat.completions.create(model="countdown", messages=CHAT, top_logprobs=3)
    chat["extra_body"] = {"best_of": 4, "bonnx": {"method": "beam"}}
    with pytest.raises(openai.BadRequestError, match="top_logprobs: not available with"):
        client.chat.completions.create(**chat)


@pytest.mark.parametrize("stop", ["=4;", ";", None], ids=str)
def test_a_stop_text_is_never_sent(client, stop):
    request = {"model": "countdown", "prompt": PUZZLE, "seed": 5, "extra_body": ONE}
    request |= {} if stop is None else {"stop": stop}
    whole = client.completions.create(**request)
    chunks = [*client.completions.create(**request, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].bonnx["scores"] == pytest.approx(whole.bonnx["scores"], abs=1e-5)
    assert all(len(chunk.choices) == 1 for chunk in chunks)


def test_the_upstream_sends_pieces_as_they_come(behind):
    """The upstream waits with the second word until the client has read the first."""
    has_read = threading.Event()

    def behave(body):
        async def parts():
            for word, reason in (("24-3=21; ", None), ("21-20=1;", "stop")):
                choice = {"index": 0, "delta": {"content": word}, "finish_reason": reason}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                assert await asyncio.to_thread(has_read.wait, 30)

        return fake.StreamingResponse(parts(), media_type="text/event-stream")

    client, upstream = behind(behave)
    chunks = []
    for chunk in client.chat.completions.create(model="countdown", messages=CHAT, stream=True, extra_body=ONE):
        has_read.set()
        chunks.append(chunk)
    assert text_of(chunks) == "24-3=21; 21-20=1;"
    assert chunks[-1].choices[0].finish_reason == "stop"
    # A space is no token of Countdown's: the text has been sent, but it has no score.
    assert chunks[-1].bonnx["scores"] == [None]
    assert "none has a score: the vocabulary has no token for ' '" in chunks[-1].bonnx["warnings"][0]
    assert "n" not in upstream.bodies[0]


def test_its_score_follows(behind, model):
    client, _ = behind(fake.stream("24-3=21;"))
    stream = client.completions.create(
        model="countdown", prompt=PUZZLE, stream=True, stream_options={"include_usage": True}, extra_body=ONE
    )
    chunks = [*stream]
    (score,) = model.rank(PUZZLE, ["24-3=21;"]).candidate_scores
    assert chunks[-1].bonnx["scores"] == pytest.approx([score], abs=1e-5)
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (5, 2)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "live"])
def test_log_probabilities_of_the_upstream(behind, stream):
    """They come in pieces, as the text does."""

    def piece(token, reason=None):
        entry = {"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": []}
        choice = {"index": 0, "delta": {"content": token}, "logprobs": {"content": [entry]}, "finish_reason": reason}
        return {"choices": [choice]}

    client, upstream = behind(fake.events(piece("24-3"), piece("=21;", "stop")))
    request = {"model": "countdown", "messages": CHAT, "logprobs": True, "top_logprobs": 0, "extra_body": ONE}
    if stream:
        choices = [chunk.choices[0] for chunk in client.chat.completions.create(**request, stream=True)]
    else:
        choices = client.chat.completions.create(**request).choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert [(entry.token, entry.logprob) for entry in entries] == [("24-3", -0.5), ("=21;", -0.5)]
    assert upstream.bodies[0]["logprobs"] is True


def test_tool_calls_go_on_as_they_are(behind):
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}
    pieces = [
        {"role": "assistant", "tool_calls": [call]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
    ]
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in pieces]
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
    client, _ = behind(fake.events(*chunks, end, "data: [DONE]\n\n"))
    sent = [*client.chat.completions.create(model="countdown", messages=CHAT, stream=True, extra_body=ONE)]
    assert [c.choices[0].delta.tool_calls[0].function.arguments for c in sent[:2]] == ["", "{}"]
    assert sent[-1].choices[0].finish_reason == "tool_calls"


def test_an_upstream_that_does_not_stream(behind):
    client, _ = behind(fake.answer("24-3=21;"))
    chunks = [*client.chat.completions.create(model="countdown", messages=CHAT, stream=True, extra_body=ONE)]
    assert text_of(chunks) == "24-3=21;"


def test_a_request_that_breaks_in_the_middle_is_not_repeated(behind):
    client, upstream = behind(fake.stream("24 - 3 = 21;", cut_after=0), retries=3)
    with pytest.raises(openai.APIError, match="none of 1 completions came: the connection to"):
        [*client.chat.completions.create(model="countdown", messages=CHAT, stream=True, extra_body=ONE)]
    assert len(upstream.bodies) == 1


def test_an_error_before_the_first_piece_has_its_status(behind):
    client, _ = behind(fake.error(429, "slow down"))
    with pytest.raises(openai.RateLimitError, match="slow down"):
        client.chat.completions.create(model="countdown", messages=CHAT, stream=True, extra_body=ONE)


def test_a_client_that_leaves_cancels_the_upstream(behind):
    client, upstream = behind(fake.stream("24 - 3 = 21;", pause=30))
    stream = client.chat.completions.create(model="countdown", messages=CHAT, stream=True, extra_body=ONE)
    next(iter(stream))
    stream.close()
    assert upstream.wait_for_cancellation()

"""OpenAI's endpoints, by OpenAI's own client: the artifact generates, or an upstream does."""

import asyncio
import json
import math
import time

import httpx
import openai
import pytest

import bonnx
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.serve import Settings
from tests.runtime.serve.servers import served
from tests.runtime.upstream import fake

PUZZLE = "3,7,20,24>1:"
CHAT = [{"role": "user", "content": PUZZLE}]
TEXTS = ["24-20=4;7-4=3;3/3=1;", "24/3=8;20-7=13;13-8=1;", "24-3=21;"]


@pytest.fixture(scope="module")
def engine(chat_engine):
    return chat_engine


@pytest.fixture(scope="module")
def model(engine):
    return bonnx.Model(engine)


@pytest.fixture(scope="module")
def url(engine):
    with served(engine, Settings(best_of=4)) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_upstream_samples_and_the_artifact_chooses(behind, model):
    client, upstream = behind(fake.stream(*TEXTS))
    answer = client.chat.completions.create(
        model="countdown", messages=CHAT, temperature=0.9, tools=[], extra_body={"best_of": 3}
    )
    ranking = model.rank(CHAT, TEXTS)
    assert answer.choices[0].message.content == ranking.best
    assert answer.choices[0].finish_reason == "stop"
    assert answer.bonnx["scores"] == pytest.approx([ranking.candidate_scores[ranking.best_index]], abs=1e-5)
    assert answer.bonnx["margin"] == pytest.approx(ranking.margin, abs=1e-5)
    assert sorted(line["score"] for line in answer.bonnx["candidates"]) == pytest.approx(
        sorted(ranking.candidate_scores), abs=1e-5
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 6, 11)
    (sent,) = upstream.bodies
    # What is not known here goes to the upstream as it is; what is ours does not.
    assert (sent["model"], sent["n"], sent["temperature"], sent["tools"]) == ("llm", 3, 0.9, [])
    assert not {"best_of", "bonnx"} & sent.keys()


def test_the_artifact_generates_and_chooses(client, model):
    answer = client.completions.create(model="countdown", prompt=PUZZLE, n=2, seed=5, max_tokens=50, logprobs=0)
    generation = model.generate(PUZZLE, n=4, seed=5, max_new_tokens=50)
    order = sorted(range(4), key=lambda i: -generation.candidates[i].score)
    assert [choice.text for choice in answer.choices] == [generation.candidates[i].text for i in order[:2]]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.bonnx["scores"] == pytest.approx([generation.candidates[i].score for i in order[:2]], abs=1e-5)
    assert answer.usage.completion_tokens == sum(len(candidate.tokens) for candidate in generation.candidates)
    best = generation.candidates[order[0]]
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(best.log_probs.tolist(), abs=1e-4)


def test_a_chat_with_the_artifact(client, model):
    answer = client.chat.completions.create(
        model="countdown", messages=CHAT, seed=5, max_completion_tokens=50, logprobs=True, user="me"
    )
    generation = model.generate(CHAT, n=4, seed=5, max_new_tokens=50)
    assert answer.choices[0].message.content == generation.best.text
    tokens = answer.choices[0].logprobs.content
    assert [token.logprob for token in tokens] == pytest.approx(generation.best.log_probs.tolist(), abs=1e-4)


def test_the_async_client_and_streaming(url):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            whole = await client.chat.completions.create(model="countdown", messages=CHAT, seed=1)
            stream = await client.chat.completions.create(
                model="countdown", messages=CHAT, seed=1, stream=True, stream_options={"include_usage": True}
            )
            return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(ask())
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].bonnx["scores"] == whole.bonnx["scores"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1


def test_text_is_streamed_too(client):
    whole = client.completions.create(model="countdown", prompt=PUZZLE, seed=1, n=2)
    chunks = [*client.completions.create(model="countdown", prompt=PUZZLE, seed=1, n=2, stream=True)]
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [*texts.values()] == [choice.text for choice in whole.choices]


@pytest.mark.parametrize("stop", [["=4;", "=8;"], "-7="], ids=str)
def test_stop_texts_of_several_tokens(client, model, stop):
    """The artifact's own end ends a completion as well."""
    texts = [stop] if isinstance(stop, str) else stop
    ends = [model.manifest.scoring.end_token, *texts]
    generation = model.generate(PUZZLE, n=4, seed=5, stop=ends)
    expected = {candidate.text for candidate in generation.candidates}
    answer = client.completions.create(model="countdown", prompt=PUZZLE, n=4, seed=5, stop=stop)
    assert {choice.text for choice in answer.choices} == expected
    assert not any(text in choice.text for choice in answer.choices for text in texts)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_models(client):
    (listed,) = client.models.list().data
    assert (listed.id, listed.object) == ("countdown", "model")
    assert abs(listed.created - time.time()) < 3600


def test_without_a_seed_each_answer_differs(client):
    texts = {client.completions.create(model="countdown", prompt=PUZZLE).bonnx["scores"][0] for _ in range(4)}
    assert len(texts) > 1


def test_completions_vote(behind):
    client, _ = behind(fake.stream("24-3=21;", "20+1=21;", TEXTS[1]))
    options = {"bonnx": {"vote": "majority", "answers": "number"}}
    answer = client.completions.create(model="countdown", prompt=PUZZLE, extra_body=options)
    assert answer.choices[0].text in ("24-3=21;", "20+1=21;")
    assert sorted(line["answer"] for line in answer.bonnx["candidates"]) == ["1", "21", "21"]
    assert {line["group_score"] for line in answer.bonnx["candidates"]} == {1.0, 2.0}


@pytest.mark.parametrize("source", ["artifact", "upstream"])
def test_adaptive_asks_for_fewer(source, client, behind):
    """A price above anything to be gained: one batch is enough."""
    if source == "upstream":
        client, _ = behind(fake.stream(*TEXTS), best_of=12)
    options = {"best_of": 12, "bonnx": {"method": "adaptive", "batch": 3, "price": 5.0}}
    answer = client.completions.create(model="countdown", prompt=PUZZLE, extra_body=options)
    assert len(answer.bonnx["candidates"]) == 3
    assert answer.bonnx["method"] == "adaptive"


def test_tool_calls_are_scored_and_returned(behind):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    whole = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    client, _ = behind(lambda body: fake.JSONResponse(whole))
    answer = client.chat.completions.create(model="countdown", messages=CHAT, extra_body={"best_of": 1})
    assert answer.choices[0].message.tool_calls[0].function.name == "add"
    assert answer.choices[0].finish_reason == "tool_calls"
    chunks = [*client.chat.completions.create(model="countdown", messages=CHAT, stream=True)]
    assert chunks[0].choices[0].delta.tool_calls[0].function.name == "add"


# ---- upstreams that fail


def test_the_choice_is_made_from_what_came(behind, model):
    """The connection breaks when two have ended; the third one fails."""
    client, upstream = behind(fake.stream(*TEXTS[:2], "7 - 3 = 4 ;", cut_after=2), fake.error(400, "no more"))
    answer = client.completions.create(model="countdown", prompt=PUZZLE)
    assert answer.choices[0].text == model.rank(PUZZLE, TEXTS[:2]).best
    (failure,) = answer.bonnx["failures"]
    assert f"the connection to {upstream.url} failed" in failure["reason"]


def test_at_the_deadline_the_best_of_what_came(behind):
    client, upstream = behind(fake.stream(TEXTS[1], "7 - 3 = 4 ;", pause=30))
    answer = client.completions.create(model="countdown", prompt=PUZZLE, extra_body={"bonnx": {"deadline": 1.0}})
    assert answer.choices[0].text == TEXTS[1]
    assert [failure["reason"] for failure in answer.bonnx["failures"]] == [
        "the deadline passed before the upstream was done"
    ] * len(answer.bonnx["failures"])
    assert upstream.wait_for_cancellation()


def test_the_request_ends_in_time_without_a_deadline_of_its_own(behind):
    client, _ = behind(fake.silence, timeout=2.0)
    with pytest.raises(openai.InternalServerError) as raised:
        client.completions.create(model="countdown", prompt=PUZZLE)
    assert raised.value.status_code == 502
    assert "the deadline passed" in raised.value.message


@pytest.mark.parametrize(
    ("behaviour", "status", "message"),
    [
        (fake.error(401, "no such key"), 502, "the upstream answered 401: no such key"),
        (fake.error(400, "too long"), 400, "the upstream answered 400: too long"),
        (fake.error(429, "slow down"), 429, "slow down"),
        (fake.error(500, "oh"), 502, "the upstream answered 500: oh"),
        (fake.page("<html>hello</html>"), 502, "expected JSON or server-sent events"),
        (fake.answer(""), 422, "can win"),
        (fake.answer("what?"), 422, "can win"),
    ],
    ids=["401", "400", "429", "500", "html", "empty", "unreadable"],
)
def test_upstreams_that_fail(behaviour, status, message, behind):
    client, _ = behind(behaviour)
    with pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(model="countdown", prompt=PUZZLE)
    assert raised.value.status_code == status, raised.value.message
    assert message in raised.value.body["message"]


def test_a_client_that_leaves_cancels_the_upstream(behind):
    client, upstream = behind(fake.silence)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1.0).completions.create(model="countdown", prompt=PUZZLE)
    assert upstream.wait_for_cancellation()


def test_a_completion_that_is_too_long_cannot_win(behind, model):
    client, _ = behind(fake.answer(TEXTS[0], "1" * 100_000, TEXTS[1]))
    answer = client.completions.create(model="countdown", prompt=PUZZLE)
    assert answer.choices[0].text == model.rank(PUZZLE, TEXTS[:2]).best
    assert [line["score"] is None for line in answer.bonnx["candidates"]] == [False, True, False]


def test_completions_that_are_too_many_tokens_at_once_are_scored_in_parts(behind, model):
    client, _ = behind(fake.answer(*TEXTS), max_tokens=64)
    answer = client.completions.create(model="countdown", prompt=PUZZLE, n=3)
    scores = sorted(model.rank(PUZZLE, TEXTS).candidate_scores, reverse=True)
    assert answer.bonnx["scores"] == pytest.approx(scores, abs=1e-5)


def test_an_error_of_the_scorer_does_not_wait_for_the_upstream(behind):
    """The second completion would come after half a minute."""
    client, upstream = behind(fake.stream(TEXTS[1], "7 - 3 = 4 ;", pause=30))
    start = time.monotonic()
    with pytest.raises(openai.BadRequestError, match="64"):
        client.completions.create(model="countdown", prompt="1," * 60)
    assert time.monotonic() - start < 15
    assert upstream.wait_for_cancellation()


def test_every_chunk_has_a_choice_unless_the_usage_is_asked_for(behind):
    client, _ = behind(fake.stream(*TEXTS))
    chunks = [*client.chat.completions.create(model="countdown", messages=CHAT, n=2, stream=True)]
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    assert len(chunks[-1].bonnx["scores"]) == 2


def test_fields_go_to_the_upstream_as_they_are(behind):
    client, upstream = behind(fake.answer(*TEXTS))
    fields = {"tools": [{"default": None, "x": [None, 1.0]}], "seed": None, "logit_bias": {"5": None}}
    messages = [{"role": "user", "content": PUZZLE, "name": None, "extra": {"a": None}}]
    client.chat.completions.create(model="countdown", messages=messages, extra_body=fields)
    (body,) = upstream.bodies
    assert {name: body[name] for name in ("messages", *fields)} == fields | {"messages": messages}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logprobs": 1, "bonnx": {"method": "beam"}}, "logprobs: not available with bonnx.method 'beam'"),
        ({"bonnx": {"answers": "tool-except:,"}}, "tool-except:FIELD,FIELD"),
        ({"user": "\ud800"}, "cannot be written as JSON"),
    ],
    ids=str,
)
def test_what_is_refused_before_the_upstream_is_asked(fields, message, behind):
    client, upstream = behind(fake.answer(*TEXTS))
    body = json.dumps({"prompt": PUZZLE, **fields})
    answer = httpx.post(f"{client.base_url}completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert not upstream.bodies


# ---- bad requests


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 5, "best_of": 4}, "best_of: expected at least n, 5; got 4"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 4, "bonnx": {"best_of": 5}}, "leave one of them out"),
        ({"tools": []}, "unknown field 'tools'"),
        ({"bonnx": {"batch": 2}}, "bonnx.batch: belongs to the method 'adaptive'"),
        ({"bonnx": {"vote": "majority"}}, "needs bonnx.answers"),
        ({"bonnx": {"votes": 1}}, "votes"),
        ({"bonnx": {"truncate": True}}, "never cut"),
        ({"temperature": -1}, "temperature"),
        ({"logprobs": 6}, "logprobs"),
        ({"prompt": ["a", "b"]}, "expected a text"),
        ({"model": "gpt-5"}, "this server has 'countdown' only"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bodies_that_cannot_be(body, message, url):
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": PUZZLE, **body}, timeout=60)
    assert answer.status_code == (404 if "model" in body else 400)
    assert message in answer.json()["error"]["message"]


def test_an_artifact_that_cannot_generate_has_no_completions(small):
    with served(open_engine(small)) as url:
        assert httpx.get(f"{url}/v1/models").status_code == 200
        assert httpx.post(f"{url}/v1/completions", json={"prompt": PUZZLE}).status_code == 404


def test_a_name_of_its_own_and_web_pages_of_others(engine):
    settings = Settings(model_name="puzzler", cors_origins=("https://example.org",), api_key="secret")
    with served(engine, settings) as url:
        asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
        answer = httpx.options(f"{url}/v1/completions", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret") as client:
            assert client.models.list().data[0].id == "puzzler"
            answer = client.completions.create(model="puzzler", prompt=PUZZLE, extra_body={"best_of": 2})
            assert answer.model == "puzzler"
            assert not math.isnan(answer.bonnx["scores"][0])


def test_a_prompt_is_kept_for_the_next_request(behind, chat_engine, monkeypatch):
    client, _ = behind(fake.stream(*TEXTS))
    chat_engine.prompts.clear()
    session, runs = chat_engine.session, []
    for owner, name in ((chat_engine, "session"), (chat_engine.prompts, "_session")):
        monkeypatch.setattr(owner, name, lambda graph: runs.append(graph) or session(graph))
    for _ in range(2):
        client.chat.completions.create(model="countdown", messages=CHAT)
    assert {run for run in runs if run.startswith("rank")} == {"rank_prefill", "rank_cached"}
    runs.clear()
    client.chat.completions.create(model="countdown", messages=CHAT)
    assert {run for run in runs if run.startswith("rank")} == {"rank_cached"}

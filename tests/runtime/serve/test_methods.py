"""Search methods over HTTP: with completions of an upstream, and with those of the artifact."""

import json

import httpx
import openai
import pytest

import bonnx
from bonnx.runtime.search.methods import METHODS, SETTINGS
from bonnx.runtime.search.search import search
from bonnx.runtime.serve import Settings
from tests.runtime.serve.servers import served
from tests.runtime.upstream import fake

PUZZLE = "3,7,20,24>1:"
CHAT = [{"role": "user", "content": PUZZLE}]


@pytest.fixture(scope="module")
def engine(chat_engine):
    return chat_engine


@pytest.fixture(scope="module")
def url(engine):
    with served(engine, Settings(max_searches=2)) as url:
        yield url


@pytest.fixture
def complete(url):
    """Completes the puzzle by a method, with a seed."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield lambda n=1, **options: client.completions.create(
            model="countdown", prompt=PUZZLE, n=n, seed=3, extra_body={"best_of": 8, "bonnx": options}
        )


def steps(begun, number):
    """Always one of four solutions, which its first step decides."""
    solutions = ["24-20=4;7-4=3;3/3=1;", "24/3=8;20-7=13;13-8=1;", "24-7=17;20-17=3;3/3=1;", "3+7=10;24-20=4;10-4=6;"]
    begun = begun.removeprefix(PUZZLE)
    return next(text for text in solutions[number % 4 :] + solutions if text.startswith(begun)).removeprefix(begun)


@pytest.mark.parametrize("method", ["beam", "dvts", "lookahead"])
@pytest.mark.parametrize("is_chat", [True, False], ids=["chat", "text"])
def test_steps_of_an_upstream(behind, model, method, is_chat):
    """The step text is the scorer's own, and the choice is that of `rank` on the finished completions."""
    client, upstream = behind(fake.continues(steps))
    prompt = {"messages": CHAT} if is_chat else {"prompt": PUZZLE}
    create = client.chat.completions.create if is_chat else client.completions.create
    answer = create(
        model="countdown",
        **prompt,
        n=2,
        temperature=0.7,
        extra_body={"bonnx": {"method": method, "best_of": 8, "width": 2}},
    )
    text = answer.choices[0].message.content if is_chat else answer.choices[0].text
    assert answer.bonnx["scores"] == pytest.approx(
        sorted((line["score"] for line in answer.bonnx["candidates"]), reverse=True)[:2], abs=1e-6
    )
    assert model.rank(CHAT if is_chat else PUZZLE, [text]).candidate_scores[0] == pytest.approx(
        answer.bonnx["scores"][0], abs=1e-5
    )
    assert answer.bonnx["method"] == method
    assert answer.bonnx["cost"]["requests"] == len(upstream.bodies)
    assert all(body["stop"] == [";"] and body["model"] == "llm" for body in upstream.bodies)
    assert {body["temperature"] for body in upstream.bodies} == ({0, 0.7} if method == "lookahead" else {0.7})
    assert all("bonnx" not in body for body in upstream.bodies)


@pytest.mark.parametrize("is_chat", [False, True], ids=["text", "chat"])
def test_bonnx_serves_steps_to_bonnx(engine, model, is_chat):
    """Countdown as upstream and as scorer: steps end at its step token, and the server says which stop text it was."""
    prompt = CHAT if is_chat else PUZZLE
    with served(engine, Settings(best_of=1)) as url, bonnx.Upstream(f"{url}/v1") as upstream:
        if is_chat:
            with pytest.raises(bonnx.UpstreamError, match="unknown field 'add_generation_prompt'"):
                bonnx.BestOfN(model, upstream).run(prompt, 8, method="beam", sampling={"seed": 1})
            return
        result = bonnx.BestOfN(model, upstream).run(prompt, 8, method="beam", width=2, sampling={"seed": 1})
        steps = httpx.post(
            f"{url}/v1/completions", json={"prompt": prompt, "n": 8, "stop": ";", "seed": 1}, timeout=60
        ).json()["choices"]
    assert all((choice["stop_reason"] == ";") == (not choice["text"].endswith(";")) for choice in steps)
    assert result.best.text.endswith(";")
    assert {completion.finish_reason for completion in result.completions} == {"stop"}
    expected = model.rank(prompt, [completion.text for completion in result.completions])
    assert result.ranking.candidate_scores == pytest.approx(expected.candidate_scores, abs=1e-5)
    assert len({completion.text for completion in result.completions}) == len(result.completions)


def test_a_client_that_leaves_cancels_the_steps(behind):
    client, upstream = behind(fake.continues(steps, pause=30))
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(
            model="countdown", prompt=PUZZLE, timeout=1.0, extra_body={"bonnx": {"method": "beam", "best_of": 4}}
        )
    assert upstream.wait_for_cancellation()


def test_at_the_deadline_the_best_of_the_steps(behind):
    client, _ = behind(fake.continues(steps, pause=30))
    answer = client.completions.create(
        model="countdown",
        prompt=PUZZLE,
        extra_body={"bonnx": {"method": "beam", "best_of": 4, "step": ";", "deadline": 0.5}},
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text.count(";") == 1
    assert len(answer.bonnx["failures"]) == 4


SETTINGS_OF = {
    "self_certainty": {},
    "pruned": {"every": 6},
    "beam": {"width": 2},
    "lookahead": {"steps": 1, "width": "sqrt"},
    "dvts": {"width": 4, "distinct": False},
    "revisions": {"chains": 2, "memory": 1},
}


@pytest.mark.parametrize("method", SETTINGS_OF)
def test_the_artifact_searches(complete, model, method):
    """The answer is that of `Model.search` with the same seed."""
    answer = complete(method=method, **SETTINGS_OF[method])
    expected = model.search(PUZZLE, method, 8, seed=3, **SETTINGS_OF[method])
    assert answer.choices[0].text == expected.best.text
    assert len(answer.bonnx["candidates"]) == len(expected.candidates)
    assert answer.usage.completion_tokens == expected.cost.sampled_tokens
    assert answer.bonnx["cost"]["computed_tokens"] == expected.cost.computed_tokens
    assert answer.bonnx["method"] == method


@pytest.mark.parametrize("method", ["weighted", "majority", "beam"])
def test_votes_by_name(complete, model, method):
    answer = complete(method=method, answers="number")
    expected = model.search(PUZZLE, method, 8, seed=3, answers="number")
    assert answer.choices[0].text == expected.best.text
    assert answer.bonnx["vote"] == expected.vote
    assert {line["answer"] for line in answer.bonnx["candidates"]} == {*expected.answers}


def test_what_adaptive_saves_is_counted(complete, url):
    answer = complete(method="adaptive", batch=2, price=0.3)
    cost = answer.bonnx["cost"]
    assert cost["completions"] == 2
    assert cost["saved_completions"] == 6
    assert cost["estimated_saved_tokens"] == 3 * answer.usage.completion_tokens
    metrics = httpx.get(f"{url}/metrics").text
    assert 'bonnx_saved_completions_total{method="adaptive"} 6.0' in metrics
    assert f'bonnx_estimated_saved_tokens_total{{method="adaptive"}} {cost["estimated_saved_tokens"]:.1f}' in metrics


@pytest.fixture
def best_of_n(url):
    """Generates the best of some candidates; gives the response."""
    body = {"prompt": PUZZLE, "n": 8, "seed": 3}
    return lambda **fields: httpx.post(f"{url}/v1/best-of-n", json={**body, **fields}, timeout=60)


@pytest.mark.parametrize("method", ["self_certainty", "beam", "adaptive"])
def test_best_of_n_searches(best_of_n, model, method):
    answer = best_of_n(method=method, token_scores=True).json()
    expected = model.search(PUZZLE, method, 8, seed=3)
    assert (answer["best"], answer["best_index"]) == (expected.best.text, expected.best_index)
    assert (answer["method"], answer["vote"]) == (method, expected.vote)
    assert [line["score"] for line in answer["candidates"]] == pytest.approx([c.score for c in expected.candidates])
    assert answer["cost"]["sampled_tokens"] == expected.cost.sampled_tokens == answer["usage"]["completion_tokens"]
    assert answer["cost"]["saved_completions"] == (8 - len(expected.candidates) if method == "adaptive" else 0)


@pytest.mark.parametrize("fields", [{"vote": "weighted"}, {"method": "majority"}, {"stream": True, "vote": "majority"}])
def test_generated_candidates_vote(best_of_n, model, fields):
    response = best_of_n(answers="number", **fields)
    vote = fields.get("vote", fields.get("method"))
    expected = model.generate(PUZZLE, n=8, seed=3, answers="number", vote=vote)
    answer = json.loads(response.text.rpartition("data: ")[2]) if "stream" in fields else response.json()
    assert (answer["best"], answer["best_index"]) == (expected.best.text, expected.best_index)
    assert [line["answer"] for line in answer["candidates"]] == [*expected.answers]
    assert [line["group_score"] for line in answer["candidates"]] == pytest.approx(
        [*map(float, expected.group_scores)], nan_ok=True
    )
    texts = [candidate.text for candidate in expected.candidates]
    ranking = model.rank(PUZZLE, texts, vote=vote, answers="number")
    assert answer["margin"] == pytest.approx(ranking.margin, abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vote": "majority"}, "vote: 'majority' needs answers"),
        ({"method": "beam", "stream": True}, "stream: not available with method 'beam'"),
        ({"batch": 2}, "batch: belongs to the method 'adaptive'; got 'best_of_n'"),
        ({"method": "beam", "width": 0}, "width"),
        ({"n": None, "candidates": ["3"], "seed": None, "method": "beam"}, "method: belongs to generation"),
    ],
    ids=str,
)
def test_what_best_of_n_refuses(best_of_n, fields, message):
    response = best_of_n(**fields)
    assert response.status_code == 400
    assert message in response.json()["message"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "beam", "width": 0}, "bonnx.width"),
        ({"method": "beam", "batch": 2}, "bonnx.batch: belongs to the method 'adaptive'; got 'beam'"),
        ({"width": 2}, "bonnx.width: belongs to the methods 'beam', 'lookahead', 'dvts'; got 'best_of_n'"),
        ({"method": "beam", "width": 9}, "a width of 9 needs at least 9 beams, a budget of 9 completions; got 8"),
        ({"method": "majority"}, "bonnx.vote: 'majority' needs bonnx.answers"),
        ({"method": "self_certainty", "vote": "score"}, "votes by its own rule"),
        ({"method": "beam", "step": ";"}, "bonnx.step: belongs to"),
        ({"method": "beams"}, "bonnx.method"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(complete, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        complete(**options)


@pytest.mark.parametrize("method", ["self_certainty", "pruned", "revisions"])
def test_methods_that_need_an_artifact(behind, method):
    client, upstream = behind(fake.error(500))
    with pytest.raises(openai.BadRequestError, match=f"'{method}' works only with an artifact that generates"):
        client.completions.create(model="countdown", prompt=PUZZLE, extra_body={"bonnx": {"method": method}})
    assert not upstream.bodies


@pytest.mark.parametrize("method", ["best_of_n", "beam", "revisions"])
def test_a_search_is_stopped_from_another_thread(engine, method):
    stop = engine.session("rank").make_stop()
    stop.terminate = True
    with pytest.raises(InterruptedError, match="the search was stopped"):
        search(engine, PUZZLE, method, 8, None, None, None, None, None, {}, stop)


def test_the_schema_has_every_method_and_setting(url):
    schema = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]["BonnxOptions"]["properties"]
    assert schema["method"]["enum"] == [*METHODS]
    for name, (_, meta, methods) in SETTINGS.items():
        assert schema[name]["description"] == f"{', '.join(methods)}: {meta.description}"
    assert schema["confidence"]["anyOf"][0] == {"minimum": 0.5, "exclusiveMaximum": 1, "type": "number"}


def test_seeds_after_the_largest_one(url):
    """`adaptive` samples in batches, each with a seed of its own; the prompt is counted once."""
    body = {
        "prompt": PUZZLE,
        "seed": 2**63 - 1,
        "best_of": 4,
        "bonnx": {"method": "adaptive", "price": 1e-9, "batch": 2},
    }
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["bonnx"]["cost"]["completions"] == 4
    assert answer.json()["usage"]["prompt_tokens"] == 10

"""`BestOfN`: any generator, and a scorer of bonnx that chooses."""

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

import bonnx
from bonnx.errors import InputError, NoWinnerError, UpstreamError
from tests.runtime.upstream import fake
from tests.runtime.upstream.fake import FakeUpstream

CHAT = [{"role": "user", "content": "What is 6 * 7?"}]
TEXTS = ["It is 41", "It is 42!", "42", "It is 43, I am quite sure"]


def by_length(prompt, candidate):
    """A scorer that likes long answers."""
    text = candidate if isinstance(candidate, str) else str(candidate[0])
    return len(text) / 100


@pytest.fixture
def scorer():
    return bonnx.FakeModel(by_length)


@pytest.fixture
def upstream():
    """Clients whose connections are closed when the test is over."""
    with contextlib.ExitStack() as stack:
        yield lambda server, *args, **options: stack.enter_context(bonnx.Upstream(server.url, *args, **options))


def test_the_best_of_an_upstream(scorer, upstream):
    with FakeUpstream(fake.stream(*TEXTS)) as server:
        best_of_n = bonnx.BestOfN(scorer, upstream(server, "m"))
        result = best_of_n.run(CHAT, n=4, sampling={"temperature": 0.8})
    assert result.best.text == TEXTS[3]
    assert sorted(completion.text for completion in result.completions) == sorted(TEXTS)
    expected = scorer.rank(CHAT, [completion.text for completion in result.completions])
    assert result.ranking == expected
    assert (result.prompt_tokens, result.completion_tokens) == (5, 8)
    assert not result.failures
    assert server.bodies[0]["temperature"] == 0.8
    assert result.to_dict()["completions"][0].keys() >= {"text", "finish_reason"}
    assert TEXTS[3] in repr(result)
    assert "<table>" in result._repr_html_()


def sync_function(prompt, n):
    return TEXTS[:n]


async def async_function(prompt, n):
    return [{"role": "assistant", "content": text} for text in TEXTS[:n]]


FUNCTIONS = {
    "function": sync_function,
    "async function": async_function,
    "model": bonnx.FakeModel(by_length, lambda prompt, i: TEXTS[i]),
}


@pytest.mark.parametrize("kind", [*FUNCTIONS, "OpenAI", "AsyncOpenAI"])
def test_every_kind_of_generator_gives_the_same(kind, scorer):
    with FakeUpstream(fake.answer(*TEXTS)) as server:

        async def choose():
            """In an event loop of the test's own, since clients belong to one."""
            client = {"OpenAI": openai.OpenAI, "AsyncOpenAI": openai.AsyncOpenAI}.get(kind)
            if client is None:
                return await bonnx.BestOfN(scorer, FUNCTIONS[kind]).arun(CHAT, 4)
            client = client(base_url=server.url, api_key="k")
            result = await bonnx.BestOfN(scorer, client, model="m").arun(CHAT, 4)
            await client.close() if kind == "AsyncOpenAI" else client.close()
            return result

        result = asyncio.run(choose())
        again = None if "OpenAI" in kind else bonnx.BestOfN(scorer, FUNCTIONS[kind]).run(CHAT, 4)
    assert result.best.text == TEXTS[3]
    assert {completion.text for completion in result.completions} == {*TEXTS}
    assert again is None or again.ranking == result.ranking


def test_run_works_inside_an_event_loop(scorer):
    async def notebook():
        return bonnx.BestOfN(scorer, async_function).run(CHAT, 2)

    assert asyncio.run(notebook()).best.text == TEXTS[1]


def test_a_client_whose_server_ignores_n(scorer):
    with (
        FakeUpstream(fake.answer(TEXTS[0], honours_n=False)) as server,
        openai.OpenAI(base_url=server.url, api_key="k") as client,
    ):
        result = bonnx.BestOfN(scorer, client, model="m").run(CHAT, 3, sampling={"seed": 1})
    assert len(result.completions) == 3
    assert sorted(body["seed"] for body in server.bodies) == [1, 2, 3]


def test_a_client_whose_server_leaves_fields_null(scorer):
    def behave(body):
        choices = [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate([None, "42"])]
        return fake.JSONResponse({"choices": choices, "usage": {"prompt_tokens": None}})

    with FakeUpstream(behave) as server, openai.OpenAI(base_url=server.url, api_key="k") as client:
        result = bonnx.BestOfN(scorer, client, model="m").run("6 * 7 =", 2)
    assert result.best.text == "42"
    assert result.prompt_tokens is None


def test_an_error_of_the_scorer_cancels_the_upstream(upstream):
    def refuse(prompt, candidate):
        raise InputError("no such roles")

    with FakeUpstream(fake.stream("one", "two three", pause=30)) as server:
        with pytest.raises(InputError, match="no such roles"):
            bonnx.BestOfN(bonnx.FakeModel(refuse), upstream(server)).run(CHAT, 2)
        end = time.monotonic() + 20
        while not server.cancelled:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_threads_share_an_upstream(scorer, upstream):
    with FakeUpstream(fake.stream(*TEXTS)) as server:
        best_of_n = bonnx.BestOfN(scorer, upstream(server, concurrency=4))
        with ThreadPoolExecutor(16) as pool:
            results = [*pool.map(lambda _: best_of_n.run(CHAT, 4).best.text, range(64))]
    assert results == [TEXTS[3]] * 64


def test_completions_vote(scorer):
    result = bonnx.BestOfN(scorer, sync_function).run(CHAT, 4, vote="majority", answers="number")
    assert result.ranking.answers == ("41", "42", "42", "43")
    assert result.best.text == TEXTS[1], "the better one of those that say 42"
    assert result.ranking == scorer.rank(CHAT, TEXTS, vote="majority", answers="number")


def test_completions_are_scored_while_others_are_under_way(upstream):
    seen = []

    def score(prompt, candidate):
        seen.append((time.monotonic(), candidate))
        return len(candidate)

    with FakeUpstream(fake.stream("first", "second one", "the third is last", pause=0.5)) as server:
        best_of_n = bonnx.BestOfN(bonnx.FakeModel(score), upstream(server))
        best_of_n.run(CHAT, 3)
    assert [text for _, text in seen] == ["first", "second one", "the third is last"]
    assert seen[0][0] + 0.4 < seen[2][0]


def test_adaptive_asks_for_no_more_than_it_needs(rng):
    """With a price above what can be gained one batch is enough; with a tiny one all are asked for."""
    texts = [str(value) for value in rng.permutation(16)]
    scorer = bonnx.FakeModel(lambda prompt, candidate: float(candidate) / 16)
    calls = []

    def generate(prompt, n):
        calls.append(n)
        return [texts.pop() for _ in range(n)]

    best_of_n = bonnx.BestOfN(scorer, generate)
    result = best_of_n.run("draw", 16, method="adaptive", batch=4, price=0.3)
    assert calls == [4]
    assert (len(result.completions), result.method) == (4, "adaptive")
    result = best_of_n.run("draw", 12, method="adaptive", batch=5, price=1e-9)
    assert calls == [4, 5, 5, 2]
    assert result.ranking.candidate_scores[result.best_index] == max(result.ranking.candidate_scores)


def test_adaptive_stops_when_the_vote_is_decided(scorer):
    calls = []

    def generate(prompt, n):
        calls.append(n)
        return ["It is 42"] * n

    bonnx.BestOfN(scorer, generate).run(CHAT, 64, method="adaptive", vote="majority", answers="number")
    assert calls == [4]


def test_the_choice_is_made_from_what_came(scorer, upstream):
    """One of four requests fails; an empty completion cannot win."""
    behaviours = [fake.answer("", honours_n=False), fake.error(400, "no"), fake.answer("good"), fake.answer("better")]
    with FakeUpstream(*behaviours) as server:
        best_of_n = bonnx.BestOfN(scorer, upstream(server, retries=0))
        result = best_of_n.run(CHAT, 4)
    assert result.best.text == "better"
    assert [failure.status for failure in result.failures] == [400]
    assert np.isnan(result.ranking.candidate_scores).sum() == 1


def test_at_the_deadline_the_best_of_what_came(scorer, upstream):
    with FakeUpstream(fake.stream("short", "longer", "much much later", pause=30)) as server:
        best_of_n = bonnx.BestOfN(scorer, upstream(server))
        result = best_of_n.run(CHAT, 3, deadline=1.0)
    assert result.best.text == "longer"
    assert len(result.failures) == 1


@pytest.mark.parametrize("generate", [lambda prompt, n: time.sleep(3) or ["late"] * n], ids=["function"])
def test_a_function_that_is_late(generate, scorer):
    with pytest.raises(UpstreamError, match="the deadline passed"):
        bonnx.BestOfN(scorer, generate).run(CHAT, 2, deadline=0.2)


def raises(prompt, n):
    raise RuntimeError("no power")


@pytest.mark.parametrize(
    ("generate", "error", "message"),
    [
        (raises, UpstreamError, "none of 3 completions came: generate raised RuntimeError: no power"),
        (lambda prompt, n: [], UpstreamError, "generate gave no completion"),
        (lambda prompt, n: "42", InputError, "expected a list of 3 texts or messages; got '42'"),
        (lambda prompt, n: [42] * n, InputError, "generate, completion 0: expected a text or a message; got 42"),
        (lambda prompt, n: [""] * n, NoWinnerError, "none of the 3 completions can win, .*: it has no tokens"),
    ],
    ids=["raises", "nothing", "a text", "numbers", "empty"],
)
def test_generators_that_fail(generate, error, message, scorer):
    with pytest.raises(error, match=message):
        bonnx.BestOfN(scorer, generate).run(CHAT, 3)


def test_a_scorer_that_cannot_read_the_prompt_ends_the_sampling(upstream):
    def refuse(prompt, candidate):
        raise InputError("the template refuses the conversation")

    with FakeUpstream(fake.stream("at once", "not before a minute has gone by", pause=10)) as server:
        best_of_n = bonnx.BestOfN(bonnx.FakeModel(refuse), upstream(server))
        with pytest.raises(InputError, match="refuses the conversation"):
            best_of_n.run(CHAT, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"n": 0}, "n: expected a whole number of at least 1"),
        ({"method": "adaptve"}, "did you mean 'adaptive'"),
        ({"batch": 2}, "unknown option 'batch' of method 'best_of_n'"),
        ({"method": "adaptive", "bath": 2}, "did you mean 'batch'"),
        ({"vote": "majority"}, "needs answers"),
        ({"vote": "majority", "answers": ["4"]}, "there are no completions yet"),
        ({"answers": "boxd"}, "expected 'boxed', 'number', 'regex:PATTERN', 'tool'"),
        ({"deadline": -1}, "deadline"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be(call, message, scorer):
    with pytest.raises(InputError, match=message):
        bonnx.BestOfN(scorer, lambda prompt, n: pytest.fail("sampled")).run(CHAT, **call)


def test_a_client_needs_a_model(scorer):
    with (
        openai.OpenAI(base_url="http://localhost", api_key="k") as client,
        pytest.raises(InputError, match="the name of the model"),
    ):
        bonnx.BestOfN(scorer, client)


def test_many_at_once_from_many_threads(scorer, upstream):
    with FakeUpstream(fake.stream(*TEXTS)) as server:
        best_of_n = bonnx.BestOfN(scorer, upstream(server))
        results = []
        threads = [threading.Thread(target=lambda: results.append(best_of_n.run(CHAT, 4))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [result.best.text for result in results] == [TEXTS[3]] * 8


def test_countdown_generates_and_ranks(countdown):
    """An artifact as scorer and as generator: the choice is that of `rank` on the same candidates."""
    model, prompt = bonnx.load(countdown, provider="cpu"), "3,5,7=22:"
    result = bonnx.BestOfN(model, model).run(prompt, 4, sampling={"seed": 7})
    expected = model.rank(prompt, [completion.text for completion in result.completions])
    assert result.best_index == expected.best_index
    assert np.allclose(result.ranking.candidate_scores, expected.candidate_scores, atol=1e-5)


def test_the_prompt_is_read_while_the_generator_works_and_kept(countdown, monkeypatch):
    model, prompt, begun = bonnx.load(countdown, provider="cpu"), "3,5,7=22:", threading.Event()
    prompts, session, graphs = model._engine.prompts, model._engine.session, []
    read = prompts.read
    monkeypatch.setattr(prompts, "read", lambda *arguments: (read(*arguments), begun.set())[0])
    monkeypatch.setattr(model._engine, "session", lambda name: graphs.append(name) or session(name))

    def generate(prompt, n):
        # The prompt is read before there are completions.
        assert begun.wait(60)
        return ["3*5=15;15+7=22;", "5*7=35;35-3=32;"]

    for _ in range(2):
        assert bonnx.BestOfN(model, generate).run(prompt, 2).best_index == 0
    assert graphs == ["rank_cached"] * 2
    assert prompts.covers(model._engine.reader.prompt(prompt))

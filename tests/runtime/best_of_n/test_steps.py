"""Search by steps over a server: each request continues what has been written to the end of the next step."""

import asyncio
import contextlib
import itertools
import random
import re

import numpy as np
import openai
import pytest

import bonnx
from bonnx.errors import InputError, UpstreamError
from bonnx.runtime.artifact.limits import TooLargeError
from tests.runtime.upstream import fake
from tests.runtime.upstream.fake import FakeUpstream

PROMPT, CHAT = "digits: ", [{"role": "user", "content": "digits"}]
LENGTH = 4


def digits(seed):
    """Writes random digits, each of them a step, until there are four."""

    def write(begun, number):
        draw = random.Random(f"{seed} {begun} {number}")
        missing = LENGTH - len(re.findall(r"\d", begun))
        return "".join(f"{draw.randrange(10)};" for _ in range(missing))

    return write


def by_sum(prompt, candidate):
    """The sum of the digits so far."""
    return sum(map(int, re.findall(r"\d", candidate)))


@pytest.fixture
def scorer():
    return bonnx.FakeModel(by_sum)


@pytest.fixture
def search(scorer):
    """Searches over a server with these behaviours; gives the result, or raises its error, and the server."""
    with contextlib.ExitStack() as stack:

        def run(*behaviours, prompt=PROMPT, n=8, retries=0, **options):
            server = stack.enter_context(FakeUpstream(*behaviours))
            upstream = stack.enter_context(bonnx.Upstream(server.url, retries=retries))
            options = {"method": "beam", "step": ";", **options}
            return bonnx.BestOfN(scorer, upstream).run(prompt, n, **options), server

        yield run


@pytest.mark.parametrize("prompt", [PROMPT, CHAT], ids=["text", "chat"])
def test_the_best_steps_continue(search, dice, prompt):
    """As the method says: of all texts of a round the best N / M are continued, each M times."""
    result, server = search(fake.continues(digits(dice.random())), prompt=prompt, width=4)
    begun = [body["messages"][1:] or [{"content": ""}] for body in server.bodies] if prompt == CHAT else None
    texts = (
        [body["prompt"].removeprefix(PROMPT) for body in server.bodies]
        if begun is None
        else [messages[0]["content"] for messages in begun]
    )
    assert texts[0] == ""
    assert server.bodies[0]["n"] == 8
    rounds = [sorted(text for text in texts if len(text) == 2 * length) for length in range(LENGTH + 1)]
    assert [len(texts) for texts in rounds] == [1, 2, 2, 2, 2]
    for before, after in itertools.pairwise(rounds):
        assert all(any(text.startswith(start) for start in before) for text in after)
    assert all(body["stop"] == [";"] for body in server.bodies)
    if prompt == CHAT:
        assert all(body["continue_final_message"] and not body["add_generation_prompt"] for body in server.bodies[1:])
        assert result.best.message == {"role": "assistant", "content": result.best.text}
    assert result.best.text in rounds[-1]
    assert len(result.best.text) == 2 * LENGTH
    assert result.method == "beam"
    assert (result.requests, result.completion_tokens) == (9, 2 * 8 * 5)
    assert not result.failures


def test_steps_find_what_whole_completions_do_not(search, dice):
    seed, better = dice.random(), 0
    for prompt in ("a: ", "b: ", "c: "):
        beam, _ = search(fake.continues(digits(seed)), prompt=prompt, n=16)
        sampled, _ = search(fake.continues(digits(seed)), prompt=prompt, n=16, method="best_of_n", step=None)
        better += beam.ranking.candidate_scores.max() - sampled.ranking.candidate_scores.max()
    assert better > 0


@pytest.mark.parametrize("tells", ["matched_stop", "text", None])
def test_every_way_to_say_why_a_step_ended(search, dice, tells):
    seed = dice.random()
    expected, _ = search(fake.continues(digits(seed)))
    result, _ = search(fake.continues(digits(seed), tells))
    assert result.best.text.rstrip(";") == expected.best.text.rstrip(";")


@pytest.mark.parametrize("method", ["dvts", "lookahead"])
def test_other_methods_by_steps(search, dice, method):
    result, server = search(fake.continues(digits(dice.random())), n=16, method=method, width=2)
    assert len(result.best.text) == 2 * LENGTH
    assert any(body.get("temperature") == 0 for body in server.bodies) == (method == "lookahead")
    assert result.ranking.candidate_scores[result.best_index] == max(result.ranking.candidate_scores)


@pytest.mark.parametrize("kind", ["OpenAI", "AsyncOpenAI"])
def test_an_openai_client_continues_too(scorer, dice, kind):
    with FakeUpstream(fake.continues(digits(dice.random()))) as server:

        async def choose():
            client = getattr(openai, kind)(base_url=server.url, api_key="k")
            result = await bonnx.BestOfN(scorer, client, model="m").arun(CHAT, 4, method="beam", width=2, step=";")
            await client.close() if kind == "AsyncOpenAI" else client.close()
            return result

        result = asyncio.run(choose())
    assert len(result.best.text) == 2 * LENGTH
    assert server.bodies[1]["continue_final_message"]


def test_rounds_end_in_whole_completions(search, dice):
    result, server = search(fake.continues(digits(dice.random())), rounds=1)
    assert [body.get("stop") for body in server.bodies] == [[";"], None, None]
    assert len(result.completions) == 8


def test_steps_that_do_not_come(search, dice):
    """One of two requests of the second round fails: the others are searched on, and it is reported."""
    good = fake.continues(digits(dice.random()))
    result, _ = search(good, fake.error(400, "too bad"), good, width=4)
    assert {failure.reason for failure in result.failures} == {"the upstream answered 400: too bad"}
    assert len(result.best.text) == 2 * LENGTH


def test_no_step_comes(search):
    with pytest.raises(UpstreamError, match="none of 8 completions came: the upstream answered 400: down"):
        search(fake.error(400, "down"))


def test_at_the_deadline_the_best_of_what_has_been_written(search, dice):
    result, server = search(fake.continues(digits(dice.random()), pause=30), deadline=1.0)
    assert result.best.finish_reason == "deadline"
    assert len(result.best.text) == 2
    assert len(result.failures) == 8
    assert server.wait_for_cancellation()


def test_at_the_deadline_finished_completions_are_preferred(search):
    """Half of the first steps end their completion; the others are never continued."""
    write = lambda begun, number: "1" if number % 2 else "9;9;"  # noqa: E731
    result, _ = search(fake.continues(write, pause=30), deadline=1.0)
    assert result.best.text == "1"
    assert {completion.text for completion in result.completions} == {"1"}


def test_cancelling_reaches_the_open_requests(scorer, dice):
    async def leave(url):
        async with bonnx.Upstream(url) as upstream:
            task = asyncio.ensure_future(bonnx.BestOfN(scorer, upstream).arun(PROMPT, 4, method="beam", step=";"))
            await asyncio.sleep(0.5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with FakeUpstream(fake.continues(digits(dice.random()), pause=30)) as server:
        asyncio.run(leave(server.url))
        assert server.wait_for_cancellation()


def test_an_error_of_the_scorer_ends_the_search(dice):
    def refuse(prompt, candidate):
        raise InputError("no such roles")

    with (
        FakeUpstream(fake.continues(digits(dice.random()))) as server,
        bonnx.Upstream(server.url) as upstream,
        pytest.raises(InputError, match="no such roles"),
    ):
        bonnx.BestOfN(bonnx.FakeModel(refuse), upstream).run(PROMPT, 4, method="beam", step=";")
    assert len(server.bodies) == 1


def test_steps_without_a_score_come_last(dice):
    """NaN for steps of even digits: such branches are continued only where there are no others."""
    scorer = bonnx.FakeModel(lambda _, text: np.nan if int(text[0]) % 2 == 0 else 1.0)
    write = lambda begun, number: f"{number % 4};" if begun == PROMPT else "5;"  # noqa: E731
    with FakeUpstream(fake.continues(write)) as server, bonnx.Upstream(server.url) as upstream:
        bonnx.BestOfN(scorer, upstream).run(PROMPT, 4, method="beam", width=2, rounds=1, step=";")
    assert {body["prompt"] for body in server.bodies[1:]} == {f"{PROMPT}1;", f"{PROMPT}3;"}


def test_what_is_too_long_for_the_scorer_does_not_cost_the_others(dice):
    """Texts with a 9 are too long: they have no score, as steps and as completions."""

    def score(prompt, text):
        if "9" in text:
            raise TooLargeError("too long")
        return by_sum(prompt, text)

    write = lambda begun, number: "9;9;" if number % 2 else digits(0)(begun, number).replace("9", "8")  # noqa: E731
    with FakeUpstream(fake.continues(write)) as server, bonnx.Upstream(server.url) as upstream:
        result = bonnx.BestOfN(bonnx.FakeModel(score), upstream).run(PROMPT, 8, method="beam", width=2, step=";")
    assert "9" not in result.best.text


def test_votes_by_name(search):
    write = lambda begun, number: ("It is 41", "It is 42", "It is 42.")[number % 3]  # noqa: E731
    result, _ = search(fake.continues(write), n=3, method="majority", step=None, answers="number")
    assert result.ranking.answers[result.best_index] == "42"
    assert result.method == "majority"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"method": "self_certainty"}, "reads the probability of every token .* expected one of best_of_n, weighted"),
        ({"method": "pruned"}, "'pruned' works only with an artifact that generates"),
        ({"method": "revisions"}, "the tokens of earlier attempts"),
        ({"method": "beam", "step": None}, "does not say what ends a step"),
        ({"method": "beam", "step": ""}, "step: expected the text that ends a step; got ''"),
        ({"method": "beam", "width": 9}, "a width of 9 needs at least 9 beams, a budget of 9 completions; got 8"),
        ({"method": "beam", "sampling": {"stop": 3}}, "stop: expected a text or a list of texts; got 3"),
        ({"method": "weighted"}, "needs answers"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(search, call, message):
    with pytest.raises(InputError, match=message):
        search(fake.error(400, "asked"), **call)


def test_only_servers_are_asked_for_steps(scorer):
    with pytest.raises(InputError, match="expected an Upstream or an OpenAI client"):
        bonnx.BestOfN(scorer, lambda prompt, n: pytest.fail("sampled")).run(PROMPT, 4, method="beam", step=";")

"""Completions from a server that speaks OpenAI's protocol, well or badly."""

import asyncio

import pytest

from bonnx.errors import InputError
from bonnx.runtime.upstream.client import Upstream
from bonnx.runtime.upstream.cost import SamplingCost
from bonnx.runtime.upstream.settings import read_key
from tests.runtime.upstream import fake
from tests.runtime.upstream.arrivals import CHAT, collect, failures, texts
from tests.runtime.upstream.fake import FakeUpstream

TEXTS = ["It is 42", "42", "forty two it is", "I do not know"]


@pytest.mark.parametrize("body", [CHAT, {"prompt": "6 * 7 ="}], ids=["chat", "text"])
def test_one_request_gives_all_completions_and_their_cost(body):
    cost = SamplingCost()
    with FakeUpstream(fake.stream(*TEXTS)) as upstream:
        arrivals = collect(upstream.url, body | {"temperature": 0.7}, 4, cost=cost, api_key="secret")
    assert texts(arrivals) == sorted(TEXTS)
    assert arrivals[0].text == "42", "the shortest ends first"
    assert {arrival.finish_reason for arrival in arrivals} == {"stop"}
    (sent,) = upstream.bodies
    assert sent == body | {
        "temperature": 0.7, "model": "m", "n": 4, "stream": True, "stream_options": {"include_usage": True}
    }  # fmt: skip
    assert upstream.headers[0]["authorization"] == "Bearer secret"
    assert upstream.paths == ["/v1/chat/completions" if "messages" in body else "/v1/completions"]
    assert (cost.prompt_tokens, cost.completion_tokens, cost.requests, cost.model) == (5, 8, 1, "fake")


@pytest.mark.parametrize(
    "behaviour",
    [
        fake.answer(*TEXTS),
        fake.answer(*TEXTS, honours_n=False),
        fake.stream(*TEXTS, honours_n=False),
        fake.stream(*TEXTS, done=False),
        fake.stream(*TEXTS, reasons=False),
        fake.refuses_several(fake.answer("It is 42")),
        fake.refuses_several(fake.stream("It is 42"), status=422),
    ],
    ids=["whole", "whole, ignores n", "ignores n", "no end", "no reasons", "refuses n", "refuses n with 422"],
)
@pytest.mark.parametrize("body", [CHAT, {"prompt": "6 * 7 ="}], ids=["chat", "text"])
def test_servers_that_do_not_do_it_all(behaviour, body):
    """As many completions as were asked for, whatever the server makes of `n` and of streaming."""
    with FakeUpstream(behaviour) as upstream:
        arrivals = collect(upstream.url, body, 4)
    assert len(texts(arrivals)) == 4
    assert not failures(arrivals)


def test_what_a_server_does_with_n_is_asked_once():
    async def run(url):
        async with Upstream(url) as upstream:
            for _ in range(2):
                assert len([a async for a in upstream.sample(CHAT | {"seed": 5}, 3)]) == 3

    with FakeUpstream(fake.stream("a b", honours_n=False)) as upstream:
        asyncio.run(run(upstream.url))
    assert [body.get("n", 1) for body in upstream.bodies] == [3, 1, 1, 1, 1, 1]
    # Equal seeds would give equal completions.
    assert sorted(body["seed"] for body in upstream.bodies) == [5, 5, 6, 6, 7, 7]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_passes_is_tried_again(status):
    cost = SamplingCost()
    behaviours = [fake.error(status, headers={"Retry-After": "0"})] * 2
    with FakeUpstream(*behaviours, fake.stream(*TEXTS)) as upstream:
        arrivals = collect(upstream.url, CHAT, 4, cost=cost)
    assert texts(arrivals) == sorted(TEXTS)
    assert cost.requests == 3


def test_a_broken_connection_loses_only_what_had_not_ended():
    with FakeUpstream(fake.stream(*TEXTS, cut_after=2), fake.stream("again one", "again two")) as upstream:
        arrivals = collect(upstream.url, CHAT, 4)
    assert texts(arrivals) == ["42", "It is 42", "again one", "again two"]
    assert [body["n"] for body in upstream.bodies] == [4, 2]


def test_options_of_streams_are_left_out_for_a_server_that_refuses_them():
    def behave(body):
        return fake.error(400, "unknown field stream_options")(body) if "stream_options" in body else plain(body)

    plain = fake.stream(TEXTS[0])
    with FakeUpstream(behave) as upstream:
        arrivals = collect(upstream.url, CHAT, 4, retries=0)
    assert texts(arrivals) == [TEXTS[0]] * 4


def test_requests_that_are_under_way_when_a_server_refuses_options_of_streams():
    async def run(url):
        async with Upstream(url, retries=0) as upstream:
            several = [asyncio.ensure_future(_first(upstream.sample(CHAT, 1))) for _ in range(4)]
            return await asyncio.gather(*several)

    def behave(body):
        return fake.error(400, "unknown field stream_options")(body) if "stream_options" in body else plain(body)

    plain = fake.stream("42")
    with FakeUpstream(behave) as upstream:
        assert texts(asyncio.run(run(upstream.url))) == ["42"] * 4


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (fake.error(401, "no such key"), "the upstream answered 401: no such key"),
        (fake.error(400, "too long"), "the upstream answered 400: too long"),
        (
            fake.page("<html>\n<h1>Welcome</h1></html>"),
            "got text/html: <html> <h1>Welcome</h1></html>; check the address",
        ),
        (fake.page("<html>bad gateway</html>", 502), "answered 502: <html>bad gateway</html>"),
        (fake.page("", 302), "answered 302"),
        (fake.page("{}{", kind="application/json"), "the upstream's answer is not completions"),
        (fake.page('{"choices": [{"index": 0}]}', kind="application/json"), "choices[0] has no 'message'"),
        (fake.page('{"choices": 3}', kind="application/json"), "Expected `array | null`"),
        (fake.page("[]", kind="application/json"), "Expected `object`"),
        (fake.events("data: {oops\n\n"), "the upstream's answer is not completions"),
        (fake.events({"choices": [{"delta": {"tool_calls": ["x"]}}]}), "expected 'tool_calls' to be a list of objects"),
        (fake.page('{"error": ' + "[" * 5000 + "]" * 5000 + "}", kind="application/json"), "nested too deeply"),
        (fake.error(401, "not a key: secret-key"), "the upstream answered 401: not a key: ***"),
        (fake.page("<p>secret-key</p>"), "got text/html: <p>***</p>"),
        (fake.events({"error": {"message": "out of memory"}}), "the upstream answered with an error: out of memory"),
        (fake.answer(), "the upstream answered without a completion"),
    ],
    ids=lambda value: value.split(":")[0][:40] if isinstance(value, str) else "",
)
def test_an_answer_that_is_none(behaviour, reason):
    """Each completion fails with a reason for people, and nothing hangs."""
    with FakeUpstream(behaviour) as upstream:
        arrivals = collect(upstream.url, CHAT, 3, retries=0, api_key="secret-key")
    assert len(arrivals) == 3
    assert all(reason in text for text in failures(arrivals)), failures(arrivals)
    assert "secret-key" not in str(arrivals)


def test_a_bad_request_is_not_sent_once_for_each_completion():
    with FakeUpstream(fake.error(400, "too long")) as upstream:
        assert len(failures(collect(upstream.url, CHAT, 16))) == 16
    assert [body.get("n") for body in upstream.bodies] == [16, None]


def test_a_server_that_is_down():
    with fake.closed_port() as url:
        arrivals = collect(url, CHAT, 2, retries=1)
    assert len(failures(arrivals)) == 2
    assert f"the connection to {url} failed" in failures(arrivals)[0]


def test_the_deadline_keeps_what_has_come():
    """One completion ends; the others would take a minute; their requests are cancelled."""
    with FakeUpstream(fake.stream("now", "much later on", honours_n=True, pause=30)) as upstream:
        arrivals = collect(upstream.url, CHAT, 2, seconds=1.0)
        assert texts(arrivals) == ["now"]
        assert failures(arrivals) == ["the deadline passed before the upstream was done"]
        assert upstream.wait_for_cancellation() == 1


def test_leaving_cancels_the_requests():
    async def run(url):
        async with Upstream(url) as upstream:
            task = asyncio.ensure_future(_first(upstream.sample(CHAT, 2)))
            await asyncio.sleep(0.5)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    with FakeUpstream(fake.silence) as upstream:
        asyncio.run(run(upstream.url))
        assert upstream.wait_for_cancellation() == 1


def test_more_than_was_asked_for_is_not_taken():
    with FakeUpstream(lambda body: fake.answer(*TEXTS)({**body, "n": 4})) as upstream:
        assert len(collect(upstream.url, CHAT, 2)) == 2


@pytest.mark.parametrize("value", ["\ud800", float("nan"), {1}], ids=["half a character", "NaN", "a set"])
def test_a_body_that_is_no_json(value):
    with pytest.raises(InputError, match="cannot be written as JSON"):
        collect("http://localhost:9/v1", CHAT | {"user": value}, 1)


def test_a_proxy_that_cannot_be_used(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "ftp://user:word@localhost")
    (failure,) = collect("http://example.org/v1", CHAT, 1)
    assert "the proxy that the environment names cannot be used" in failure.reason
    assert "word" not in failure.reason


def test_a_redirect_is_not_followed():
    with FakeUpstream(fake.answer("stolen")) as other:
        moved = lambda body: fake.Response("", 307, {"Location": f"{other.url}/chat/completions"})  # noqa: E731
        with FakeUpstream(moved) as upstream:
            assert "answered 307" in failures(collect(upstream.url, CHAT, 1, api_key="secret"))[0]
        assert not other.bodies


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "localhost:8000"},
        {"url": "ftp://host/v1"},
        {"url": "http://user:word@host/v1"},
        {"url": 3},
        {"url": "http://host:99999/v1"},
        {"url": "http://[::1/v1"},
        {"url": "http://host", "concurrency": 0},
        {"url": "http://host", "retries": -1},
        {"url": "http://host", "timeout": 0},
        {"url": "http://host", "api_key": "two\nlines"},
        {"url": "http://host", "api_key": ""},
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(InputError, match="expected"):
        Upstream(**settings)


def test_a_key_is_read_from_a_file_or_the_environment_and_never_shown(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("from-file\n")
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    assert read_key(tmp_path / "key") == "from-file"
    assert read_key(None) == "from-environment"
    assert "from-file" not in repr(Upstream("http://host/v1", api_key="from-file").settings)
    with pytest.raises(InputError, match="cannot be read"):
        read_key(tmp_path / "other")


async def _first(arrivals):
    async for arrival in arrivals:
        return arrival

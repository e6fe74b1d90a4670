"""Faults of servers, of the way to them and of the program that asks them."""

import asyncio
import contextlib
import datetime
import email.utils
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from bonnx.runtime.upstream import client, reading
from bonnx.runtime.upstream.client import Upstream
from bonnx.runtime.upstream.reading import read_events
from tests.runtime.upstream import fake
from tests.runtime.upstream.arrivals import CHAT, collect, failures, texts
from tests.runtime.upstream.fake import FakeUpstream

SIXTEEN = [f"text {i}" for i in range(16)]


# ---- numbers and seeds


def capped(most, behaviour):
    """Refuses requests for more completions than so many."""
    return lambda body: fake.error(400, f"n: at most {most}")(body) if body.get("n", 1) > most else behaviour(body)


def test_a_server_that_caps_n_is_asked_in_pieces():
    async def run(url):
        async with Upstream(url) as upstream:
            first = [arrival async for arrival in upstream.sample(CHAT, 4)]
            return first, [arrival async for arrival in upstream.sample(CHAT, 14)]

    with FakeUpstream(capped(8, fake.answer(*SIXTEEN))) as upstream:
        first, second = asyncio.run(run(upstream.url))
    assert (len(texts(first)), len(texts(second))) == (4, 14)
    # Once it has refused 14, no more than it has honoured are asked for.
    assert [body.get("n", 1) for body in upstream.bodies] == [4, 14, 4, 4, 4, 2]


def test_a_bad_request_to_a_server_that_honours_n_is_not_sent_for_each_completion():
    async def run(url):
        async with Upstream(url) as upstream:
            first = [arrival async for arrival in upstream.sample(CHAT, 4)]
            return first, [arrival async for arrival in upstream.sample(CHAT, 8)]

    with FakeUpstream(fake.answer(*SIXTEEN), fake.error(400, "too long")) as upstream:
        _, second = asyncio.run(run(upstream.url))
    assert failures(second) == ["the upstream answered 400: too long"] * 8
    assert [body.get("n", 1) for body in upstream.bodies] == [4, 8, 4]


def test_a_server_that_gives_fewer_than_asked_is_asked_for_as_many_at_once():
    with FakeUpstream(lambda body: fake.answer(*SIXTEEN[:5])(body)) as upstream:
        arrivals = collect(upstream.url, CHAT, 12)
    assert len(texts(arrivals)) == 12
    assert [body.get("n", 1) for body in upstream.bodies] == [12, 5, 2]


def test_seeds_that_were_used_before_a_cut_are_not_used_again():
    """Choices 1 and 3 of 5 have ended: what is missing are those with the other seeds."""

    def cut(body):
        async def parts():
            for index in (3, 1):
                choice = {"index": index, "delta": {"content": f"{body['seed'] + index}"}, "finish_reason": "stop"}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            raise ConnectionResetError

        return fake.StreamingResponse(parts(), media_type="text/event-stream")

    def rest(body):
        return fake.answer(*(str(body["seed"] + i) for i in range(body.get("n", 1))))(body)

    with FakeUpstream(cut, rest) as upstream:
        arrivals = collect(upstream.url, CHAT | {"seed": 100}, 5)
    assert texts(arrivals) == ["100", "101", "102", "103", "104"]
    assert sorted((body["seed"], body.get("n", 1)) for body in upstream.bodies[1:]) == [(100, 1), (102, 1), (104, 1)]


def test_choices_with_numbers_that_cannot_be_are_taken_as_they_come():
    def chunk(index, text):
        return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": "stop"}]}

    with FakeUpstream(fake.events(chunk(7, "a"), chunk(-1, "b"), chunk(0, "c"))) as upstream:
        assert texts(collect(upstream.url, CHAT, 3)) == ["a", "b", "c"]


# ---- answers


def test_a_date_to_try_again_at():
    date = email.utils.format_datetime(datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=1), True)
    with FakeUpstream(fake.error(429, "slow down", {"Retry-After": date})) as upstream:
        # An hour is too long to wait for.
        assert failures(collect(upstream.url, CHAT, 1)) == ["the upstream answered 429: slow down"]
    assert len(upstream.bodies) == 1
    past = fake.error(503, "wait", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
    with FakeUpstream(past, fake.answer("now")) as upstream:
        start = time.monotonic()
        assert texts(collect(upstream.url, CHAT, 1)) == ["now"]
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("value", ["nan", "inf", "soon", "Wed, 99 Oct 2015 07:28:00 GMT", ""])
def test_a_time_to_try_again_at_that_says_nothing(value):
    response = client.httpx.Response(429, headers={"Retry-After": value})
    assert client._retry_after(response) is None


@pytest.mark.parametrize("zone", ["GMT", "-0000", "+0200"])
def test_zones_of_dates(zone, monkeypatch):
    hours = 2 if zone == "+0200" else 0
    date = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(hours=hours, seconds=20)
    value = f"{email.utils.format_datetime(date.replace(tzinfo=None)).removesuffix(' -0000')} {zone}"
    response = client.httpx.Response(429, headers={"Retry-After": value})
    assert 10 < client._retry_after(response) <= 20


def test_half_of_a_surrogate_pair_spoils_one_completion():
    choices = [
        {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        for i, text in enumerate(["good", "bad\ud83d"])
    ]
    with FakeUpstream(fake.page(json.dumps({"choices": choices}), kind="application/json")) as upstream:
        assert texts(collect(upstream.url, CHAT, 2)) == ["bad\ud83d", "good"]
    chunks = [
        {"choices": [{"index": i, "delta": {"content": choice["message"]["content"]}, "finish_reason": "stop"}]}
        for i, choice in enumerate(choices)
    ]
    with FakeUpstream(fake.events(*chunks)) as upstream:
        assert texts(collect(upstream.url, CHAT, 2)) == ["bad\ud83d", "good"]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (fake.events("data: " + "x" * 3000 + "\n\n"), "has more than 1000 bytes"),
        (fake.events("x" * 3000), "a line has more than 1000 bytes"),
        (fake.events(*["data: xxxxxxxxx\n"] * 200), "an event has more than 1000 bytes"),
        (fake.answer("x" * 3000), "it has more than 1000 bytes"),
        (fake.error(400, "x" * 3000), "answered 400"),
        (fake.page("x" * 3000), "expected JSON or server-sent events"),
    ],
    ids=["event", "line", "lines of an event", "whole answer", "error", "page"],
)
def test_answers_that_are_too_long(behaviour, reason, monkeypatch):
    """Nothing is read beyond the limit, and the reason says so."""
    monkeypatch.setattr(reading, "MOST_BYTES", 1000)
    monkeypatch.setattr(reading, "MOST_ERROR_BYTES", 500)
    with FakeUpstream(behaviour) as upstream:
        assert reason in failures(collect(upstream.url, CHAT, 1, retries=0))[0]


def test_a_stream_that_does_not_end(monkeypatch):
    monkeypatch.setattr("bonnx.runtime.upstream.events._MOST_PIECES", 50)
    piece = {"choices": [{"index": 0, "delta": {"content": "again "}}]}
    with FakeUpstream(fake.events(*[piece] * 200)) as upstream:
        assert "it has more than 50 pieces" in failures(collect(upstream.url, CHAT, 1))[0]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=repr)
def test_events_in_pieces_of_any_size(end, rng):
    """Lines end as the standard has it, wherever the network cuts them."""
    written = (
        f": hello{end}data: a{end}data:b{end}id: 3{end}{end}event: x{end}{end}data:  é\u2028\x85{end}{end}data: last"
    )
    whole = written.encode()

    class Cut:
        def __init__(self, places):
            self.places = [0, *sorted(places), len(whole)]

        async def aiter_bytes(self):
            for start, stop in zip(self.places, self.places[1:], strict=False):
                yield whole[start:stop]

    async def read(places):
        return [data async for data in read_events(Cut(places))]

    expected = ["a\nb", " é\u2028\x85", "last"]
    assert asyncio.run(read(range(1, len(whole)))) == expected
    for _ in range(20):
        assert asyncio.run(read(rng.integers(0, len(whole), 4).tolist())) == expected


# ---- the way there


def test_a_server_without_tls_at_an_https_address():
    with FakeUpstream(fake.answer("a")) as upstream:
        (reason,) = failures(collect(upstream.url.replace("http:", "https:"), CHAT, 1, retries=0))
    assert "check the address, also whether it begins with http or https" in reason


def test_a_server_that_speaks_something_else():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:

        def answer():
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"220 smtp ready\r\n")
            connection.shutdown(socket.SHUT_WR)
            # What is not read would reset the connection, and the answer with it.
            while connection.recv(65536):
                pass
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        (reason,) = failures(collect(f"http://127.0.0.1:{server.getsockname()[1]}/v1", CHAT, 1, retries=0))
    assert "check the address" in reason


def test_a_server_that_is_silent():
    with FakeUpstream(fake.silence) as upstream:
        (reason,) = failures(collect(upstream.url, CHAT, 1, retries=0, timeout=0.5))
    assert reason == f"the connection to {upstream.url} failed: nothing came for 0.5 s"


def test_the_proxy_that_the_environment_names(monkeypatch):
    """It gets the request, with the server's address in it."""
    asked = []
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as proxy:

        def answer():
            connection, _ = proxy.accept()
            with connection:
                asked.append(connection.recv(65536))
                body = b'{"choices": [{"index": 0, "message": {"content": "by proxy"}, "finish_reason": "stop"}]}'
                head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)

        threading.Thread(target=answer, daemon=True).start()
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert texts(collect("http://model.example/v1", CHAT, 1, retries=0)) == ["by proxy"]
    assert asked[0].startswith(b"POST http://model.example/v1/chat/completions HTTP/1.1")


# ---- the program


def test_connections_close_with_their_event_loop():
    """A program that never closes an `Upstream` leaves no socket behind when `asyncio.run` returns."""

    async def run(upstream):
        return [arrival async for arrival in upstream.sample(CHAT, 1)]

    with FakeUpstream(fake.answer("a")) as server:
        upstream = Upstream(server.url)
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        for _ in range(6):
            assert texts(asyncio.run(run(upstream))) == ["a"]
        gc.collect()
        assert not upstream._connections._loops
        if before:
            assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_loop_that_ends_without_closing_its_generators():
    upstream = Upstream("http://localhost:9/v1", retries=0)

    async def run():
        return [arrival async for arrival in upstream.sample(CHAT, 1)]

    async def forget():
        await run()
        # As if the loop had been closed at once.
        asyncio.get_running_loop()._asyncgens.clear()

    asyncio.run(forget())
    asyncio.run(run())
    assert not [loop for loop in upstream._connections._loops if not loop.is_closed()]


INTERRUPTED = """
import os, signal, threading, bonnx
upstream = bonnx.Upstream({url!r})
best = bonnx.BestOfN(bonnx.FakeModel(lambda prompt, text: 1.0), upstream)
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    best.run("2+2=", 2)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_cancels_the_requests():
    with FakeUpstream(fake.silence) as upstream:
        code = INTERRUPTED.format(url=upstream.url)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
        assert done.stdout == "interrupted\n", done.stderr
        assert upstream.wait_for_cancellation()

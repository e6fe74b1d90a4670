"""What a server refuses, over real HTTP: full queues, late and large requests, wrong keys and bad input."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from cohere import ClientV2

import bonnx
from bonnx.runtime.rank import run as ranking
from bonnx.runtime.serve import Settings
from tests.runtime.serve.servers import served

PUZZLE = "3,7,20,24>1:"
NAME = "countdown"


class Gate:
    """Holds rankings until it is opened."""

    def __init__(self, monkeypatch):
        self.open, self.entered, self.stopped = threading.Event(), threading.Event(), threading.Event()
        run = ranking.run_together

        def held(engine, requests, stop=None):
            self.entered.set()
            while not self.open.wait(0.005):
                if stop.terminate:
                    self.stopped.set()
                    raise RuntimeError("terminated")
            return run(engine, requests, stop)

        monkeypatch.setattr(ranking, "run_together", held)


BODY = {"prompt": PUZZLE, "candidates": ["24-20=4;", "20-7=13;"]}


def test_a_full_queue_answers_429(engine, monkeypatch):
    gate = Gate(monkeypatch)
    with served(engine, Settings(max_queue=2)) as url, ThreadPoolExecutor(3) as pool:
        post = lambda: httpx.post(f"{url}/v1/best-of-n", json=BODY, timeout=60)  # noqa: E731
        first = pool.submit(post)
        assert gate.entered.wait(20)
        waiting = [pool.submit(post) for _ in range(2)]
        until = time.monotonic() + 20
        while 'bonnx_waiting_requests{batcher="rank"} 2.0' not in httpx.get(f"{url}/metrics", timeout=60).text:
            assert time.monotonic() < until
        refused = post()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded"
        gate.open.set()
        assert [future.result().status_code for future in (first, *waiting)] == [200] * 3


def test_a_request_has_its_time(engine, monkeypatch):
    gate = Gate(monkeypatch)
    with served(engine) as url:
        late = httpx.post(f"{url}/v1/best-of-n", json=BODY, headers={"X-Request-Timeout": "0.2"}, timeout=60)
        assert late.status_code == 504
        assert late.json()["error"]["type"] == "deadline_exceeded"
        # Nobody waits for this run any more, so it was ended.
        assert gate.stopped.wait(20)
        gate.open.set()
        assert httpx.post(f"{url}/v1/best-of-n", json=BODY, timeout=60).status_code == 200


@pytest.mark.parametrize("seconds", ["-1", "soon", "nan"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(client, seconds):
    refused = client.post("/v1/best-of-n", json=BODY, headers={"X-Request-Timeout": seconds})
    assert refused.status_code == 400
    assert refused.json()["message"] == f"X-Request-Timeout: expected seconds above 0; got '{seconds}'"


def test_a_client_that_goes_is_not_worked_for(engine, monkeypatch):
    gate = Gate(monkeypatch)
    with served(engine) as url:

        async def leave():
            async with httpx.AsyncClient(timeout=60) as client:
                task = asyncio.ensure_future(client.post(f"{url}/v1/best-of-n", json=BODY))
                while not gate.entered.is_set():
                    await asyncio.sleep(0.01)
                task.cancel()

        asyncio.run(leave())
        assert gate.stopped.wait(20)
        gate.open.set()
        assert httpx.post(f"{url}/v1/best-of-n", json=BODY, timeout=60).status_code == 200


def raw(url, data, wait=20.0):
    """What the server answers to bytes, until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_bodies_are_bounded(engine):
    with served(engine, Settings(max_body=2000, body_timeout=0.5, max_tokens=400)) as url:
        head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        # Refused by the announced size: not a byte of the body was sent.
        assert b" 413 " in raw(url, head + b"Content-Length: 2001\r\n\r\n").split(b"\r\n")[0]
        chunks = b"".join(b"400\r\n" + b" " * 0x400 + b"\r\n" for _ in range(3))
        assert b" 413 " in raw(url, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks).split(b"\r\n")[0]
        assert b" 408 " in raw(url, head + b"Content-Length: 100\r\n\r\n{").split(b"\r\n")[0]
        large = httpx.post(f"{url}/v1/best-of-n", json={"prompt": PUZZLE, "n": 200}, timeout=60)
        assert large.status_code == 400
        assert "takes at most 400 at once" in large.json()["message"]
        long = httpx.post(f"{url}/v1/best-of-n", json={"prompt": "1" * 1500, "n": 2}, timeout=60)
        assert "characters are more than 64 tokens can hold" in long.json()["message"]


@pytest.fixture(scope="module")
def locked(engine):
    """The address of a server that wants a key."""
    with served(engine, Settings(api_key="secret")) as url:
        yield url


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}],
    ids=["none", "another", "without its scheme"],
)
def test_a_request_without_the_key_is_refused(locked, headers):
    refused = httpx.post(f"{locked}/v1/best-of-n", json=BODY, headers=headers, timeout=60)
    assert refused.status_code == 401
    assert "secret" not in refused.text


def test_a_key_opens_everything_but_health_needs_none(locked):
    assert httpx.get(f"{locked}/metrics", timeout=60).status_code == 401
    assert httpx.get(f"{locked}/health", timeout=60).status_code == 200
    with httpx.Client(timeout=60) as http:
        client = ClientV2("secret", base_url=locked, httpx_client=http)
        assert client.rerank(model=NAME, query=PUZZLE, documents=["1+2=3;"]).results


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "expected a JSON object"),
        (b"\xff\xfe", ""),
        (b"[" * 100000, ""),
        ({"prompt": 1, "n": 2}, "prompt: expected text, messages, token ids"),
        ({"prompt": PUZZLE}, "got neither"),
        ({"prompt": PUZZLE, "n": 1, "candidates": ["1"]}, "got both"),
        ({"prompt": PUZZLE, "n": 1, "tempratur": 1}, "did you mean 'temperature'"),
        ({"prompt": PUZZLE, "n": 1, "answers": ["3"]}, "a list belongs to given candidates"),
        ({"prompt": PUZZLE, "candidates": ["1+1=2;"], "seed": 1}, "seed: belongs to generation"),
        ({"prompt": PUZZLE, "candidates": []}, "candidates"),
        ({"prompt": PUZZLE, "candidates": ["1+1=2;"], "vote": "weighted"}, "each candidate, 'boxed' or 'number'"),
        ({"prompt": PUZZLE, "candidates": ["1;", None]}, "candidates[1] is not one of these"),
        ({"prompt": "what?", "n": 1}, "no token for"),
        ({"prompt": [{"role": "user", "content": "x"}], "n": 1}, "chat template"),
        ({"prompt": PUZZLE, "n": 1, "model": "other"}, "this server has 'countdown' only"),
        ({"prompt": [99999], "n": 1}, "outside the vocabulary"),
        ({"prompt": PUZZLE, "candidates": ["1;" * 60]}, "takes at most 64 together"),
    ],
)
def test_bad_input_is_explained(client, body, message):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/v1/best-of-n", content=data, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404)
    assert message in answer.json()["message"]
    assert not any(word in answer.text for word in ("Traceback", "/tmp", ".py"))


def test_what_goes_wrong_inside_is_not_told(engine, monkeypatch, caplog):
    def fail(engine, requests, stop=None):
        raise RuntimeError("/secret/place failed")

    monkeypatch.setattr(ranking, "run_together", fail)
    with served(engine) as url:
        answer = httpx.post(f"{url}/v1/best-of-n", json=BODY, timeout=60)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    number = answer.headers["x-request-id"]
    assert number in answer.json()["message"]
    assert "/secret/place failed" in caplog.text


def test_no_winner_is_said(engine, monkeypatch):
    lost = bonnx.NoWinnerError("none of the candidates can win")
    monkeypatch.setattr(ranking, "run_together", lambda engine, requests, stop=None: [lost] * len(requests))
    with served(engine) as url:
        answer = httpx.post(f"{url}/v1/best-of-n", json=BODY, timeout=60)
    assert answer.status_code == 422
    assert answer.json()["error"] == {"message": str(lost), "type": "no_winner", "code": 422}

"""`bonnx serve` as a process: where it listens, and how it ends."""

import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from bonnx.errors import InputError
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.serve import create_app
from bonnx.runtime.serve.server import bind_to, make_server
from tests.runtime.serve.servers import COMMAND, Process

# Seconds that a busy machine may add; a server that waited for its clients would take its whole grace, 30 seconds.
LATE = 15


def address(url):
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def traces(server):
    return [line for line in server.lines if "trace" in line or "Traceback" in line.get("text", "")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_ends_at_once(countdown, number):
    with (
        Process(countdown) as server,
        httpx.Client(base_url=server.url) as client,
        socket.create_connection(address(server.url)) as half,
    ):
        # A connection that is kept open and one whose request has only begun do not hold it up.
        assert client.get("/health").status_code == 200
        half.sendall(b"GET /hea")
        start = time.monotonic()
        assert server.stop(number) == 0
        assert time.monotonic() - start < LATE
        assert not traces(server)


def test_what_does_not_end_is_cut_off(countdown):
    with Process(countdown, "--grace", "1") as server, socket.create_connection(address(server.url)) as slow:
        head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        slow.sendall(head)
        httpx.get(f"{server.url}/health", timeout=60)
        assert server.stop(signal.SIGINT) == 0
        answer = b"".join(iter(lambda: slow.recv(65536), b""))
        assert b" 503 " in answer.split(b"\r\n")[0]
        assert b"this server is stopping" in answer
        assert not traces(server)


def test_long_generations_are_cut_off(tiny):
    """A run and a stream that would take a minute: both end with the grace."""
    body = {"prompt": [1, 2], "n": 8, "max_new_tokens": 8000, "stop": []}
    with (
        Process(tiny, "--grace", "1", "--timeout", "300") as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
        client.stream("POST", "/v1/best-of-n", json=body | {"stream": True}) as stream,
        ThreadPoolExecutor() as pool,
    ):
        lines = stream.iter_lines()
        assert next(lines) == "event: progress"
        run = pool.submit(client.post, "/v1/best-of-n", json=body)
        # Nothing waits once the run has been taken.
        until = time.monotonic() + 60
        while 'bonnx_waiting_requests{batcher="generate"} 0.0' not in client.get("/metrics").text.splitlines():
            assert time.monotonic() < until
        start = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert time.monotonic() - start < 1 + LATE
        assert run.result().status_code == 503
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
        assert not traces(server)


@pytest.mark.parametrize("wait", [0.0, 1.5], ids=["at once", "while it loads"])
def test_a_signal_before_it_listens(countdown, wait):
    with subprocess.Popen([*COMMAND, str(countdown), "--port", "0"], stderr=subprocess.PIPE, text=True) as server:
        time.sleep(wait)
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=60)
    assert server.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in log


def refused(*options):
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_port_in_use_is_said_in_one_line(countdown):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"--port: {port} of 127.0.0.1 is in use" in refused(str(countdown), "--port", str(port))
        with pytest.raises(InputError, match="in use"):
            bind_to("localhost", port)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 65536, "expected 0 .any free port. to 65535; got 65536"),
        ("127.0.0.1", -1, "got -1"),
        ("203.0.113.7", 0, "is not an address of this machine"),
        ("nowhere.invalid", 0, "there is no address 'nowhere.invalid'"),
        ("", 0, "there is no address ''"),
        ("a" * 300, 0, "there is no address"),
        ("\ud800", 0, "there is no address"),
        ("a\0b", 0, "there is no address"),
    ],
)
def test_addresses_that_are_refused(host, port, message):
    with pytest.raises(InputError, match=message):
        bind_to(host, port)


def test_a_port_that_another_took_meanwhile(small):
    """Both are bound to it, and the other one is the first to listen."""
    (first,) = bind_to("127.0.0.1", 0)
    port = first.getsockname()[1]
    (second,) = bind_to("127.0.0.1", port)
    with first, second:
        first.listen()
        with pytest.raises(InputError, match=f"{port} of 127.0.0.1 is in use"):
            make_server(create_app(open_engine(small))).run([second])


@pytest.mark.parametrize(("option", "value"), [("max-connections", "0"), ("grace", "-1")])
def test_options_that_would_stop_everything(countdown, option, value):
    assert f"--{option}: expected at least" in refused(str(countdown), f"--{option}", value)

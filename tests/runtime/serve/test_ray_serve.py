"""The same application on Ray Serve, in processes of this machine."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from bonnx.runtime.engine.engine import open_engine
from tests.tolerance import RUNTIME, within

pytest.importorskip("ray.serve")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def replicas():
    """Process ids of the replicas on this machine."""
    listed = subprocess.run(["pgrep", "-f", "^ray::ServeReplica:bonnx"], capture_output=True, text=True, check=False)
    return [int(number) for number in listed.stdout.split()]


@pytest.fixture(scope="module")
def engine(small):
    return open_engine(small)


@pytest.fixture(scope="module")
def url(small, tmp_path_factory):
    port = free_port()
    log = tmp_path_factory.mktemp("ray") / "log"
    command = [sys.executable, "-m", "bonnx", "serve", str(small), "--ray", "--replicas", "2"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    url = f"http://127.0.0.1:{port}"
    wait(lambda: process.poll() is not None or answers(url), 240)
    assert process.poll() is None, log.read_text()
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, log.read_text()


def answers(url):
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def wait(ready, seconds):
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.1)


def ask(url, body):
    return httpx.post(f"{url}/v1/best-of-n", json=body, timeout=60)


def draw(rng):
    return {"prompt": rng.standard_normal((4, 12)).tolist(), "candidates": rng.standard_normal((3, 5, 12)).tolist()}


def check(answer, model, body):
    assert answer.status_code == 200, answer.text
    expected = model.rank(np.array(body["prompt"], np.float32), list(np.array(body["candidates"], np.float32)))
    assert within([c["score"] for c in answer.json()["candidates"]], expected.candidate_scores, RUNTIME)


def test_replicas_answer_as_the_model_does_and_one_that_is_killed_comes_back(url, model, rng):
    for _ in range(10):
        body = draw(rng)
        check(ask(url, body), model, body)
    refused = ask(url, {"prompt": 3})
    assert refused.status_code == 400
    assert "prompt: expected text" in refused.json()["message"]
    killed, *others = replicas()
    assert others
    os.kill(killed, signal.SIGKILL)
    # The requests of the dead one are lost, and their clients get an error; the next attempt is answered.
    wait(lambda: killed not in replicas() and len(replicas()) >= 2, 120)
    for _ in range(10):
        body = draw(rng)
        answer = ask(url, body)
        check(answer if answer.status_code == 200 else ask(url, body), model, body)

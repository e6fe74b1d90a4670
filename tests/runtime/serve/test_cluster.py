"""The same application on Ray Serve, in processes of this machine: an ingress before replicas."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from benchmarks.loading import free_port
from bonnx.models.countdown.puzzle import draw_solution
from tests.tolerance import RUNTIME, within

pytest.importorskip("ray.serve")

from ray.cluster_utils import Cluster

from benchmarks.cluster import replica_pids
from bonnx.errors import InputError
from bonnx.runtime.serve import Settings
from bonnx.runtime.serve.cluster import Scale
from bonnx.runtime.serve.cluster.forwarded import Forwarded, prompt_key
from bonnx.runtime.serve.cluster.replica import Replica
from bonnx.runtime.serve.cluster.router import order_of_preference


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes, which may have more cores than this machine."""
    node = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args=node)
    try:
        made.add_node(**node)
        yield made
    finally:
        made.shutdown()


@pytest.fixture(scope="module")
def url(cluster, countdown, tmp_path_factory):
    """A server that grows by itself from two replicas to three."""
    port = free_port()
    log = tmp_path_factory.mktemp("ray") / "log"
    command = [sys.executable, "-m", "bonnx", "serve", str(countdown), "--port", str(port)]
    command += ["--ray", "--ray-address", cluster.address, "--replicas", "2", "--max-replicas", "3"]
    command += ["--scale-up-after", "3", "--scale-down-after", "3"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
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


def ask(url, body, **options):
    return httpx.post(f"{url}/v1/best-of-n", json=body, timeout=60, **options)


def puzzle(dice):
    return draw_solution(dice, 4)[0].prompt


def ranking(dice):
    return {"prompt": puzzle(dice), "candidates": [draw_solution(dice, 4)[1] for _ in range(3)]}


def generation(dice, n=2):
    return {"prompt": puzzle(dice), "n": n, "seed": dice.randrange(2**53), "max_new_tokens": 24}


def check(answer, model, body):
    assert answer.status_code == 200, answer.text
    found = answer.json()["candidates"]
    if "n" in body:
        expected = model.generate(body["prompt"], n=body["n"], seed=body["seed"], max_new_tokens=24)
        assert [c["text"] for c in found] == [c.text for c in expected.candidates]
    else:
        expected = model.rank(body["prompt"], body["candidates"]).candidate_scores
        assert within([c["score"] for c in found], expected, RUNTIME)


def test_replicas_answer_as_the_model_does(url, model, dice):
    for _ in range(5):
        for body in (ranking(dice), generation(dice)):
            check(ask(url, body), model, body)
    refused = ask(url, {"prompt": 3}, headers={"X-Request-Id": "mine"})
    assert refused.status_code == 400
    assert "prompt: expected text" in refused.json()["message"]
    assert refused.headers["x-request-id"] == "mine"
    assert httpx.get(f"{url}/nowhere").status_code == 404
    assert httpx.get(f"{url}/openapi.json").json()["info"]["title"] == "bonnx"
    late = ask(url, generation(dice, 64), headers={"X-Request-Timeout": "0.001"})
    assert late.status_code == 504


def test_one_connection_serves_request_after_request(url, model, dice):
    with httpx.Client(timeout=60, limits=httpx.Limits(max_connections=1)) as client:
        for _ in range(100):
            body = ranking(dice)
            check(client.post(f"{url}/v1/best-of-n", json=body), model, body)


def test_a_stream_is_that_of_the_model(url, model, dice):
    body = generation(dice, 4)
    events = []
    with httpx.stream("POST", f"{url}/v1/best-of-n", json=body | {"stream": True}, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert len(events) > 2
    expected = model.generate(body["prompt"], n=4, seed=body["seed"], max_new_tokens=24)
    assert [c["text"] for c in events[-1]["candidates"]] == [c.text for c in expected.candidates]


def test_requests_with_the_same_prompt_go_to_the_same_replica(url, dice):
    replicas = defaultdict(set)
    for _ in range(3):
        # The same draws again: each round has the prompts of the first, with other candidates.
        prompts = random.Random(7)
        for prompt in (puzzle(prompts) for _ in range(12)):
            answer = ask(url, {"prompt": prompt, "candidates": [draw_solution(dice, 4)[1]]})
            replicas[prompt].add(answer.headers["x-replica"])
    assert {len(each) for each in replicas.values()} == {1}
    assert len(set.union(*replicas.values())) > 1


def test_a_replica_that_dies_loses_no_request(url, model, dice):
    bodies = [generation(dice, 8) if i % 2 else ranking(dice) for i in range(60)]
    killed = []

    def kill():
        killed.extend(replica_pids()[:1])
        os.kill(killed[0], signal.SIGKILL)

    threading.Timer(0.7, kill).start()
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda body: ask(url, body), bodies))
    assert killed
    for answer, body in zip(found, bodies, strict=True):
        check(answer, model, body)
    wait(lambda: killed[0] not in replica_pids() and len(replica_pids()) >= 2, 120)


def test_a_stream_that_has_begun_ends_with_an_error_if_its_replica_dies(url, dice):
    wait(lambda: len(replica_pids()) >= 2, 120)
    body = {"prompt": puzzle(dice), "n": 64, "max_new_tokens": 24, "stream": True, "temperature": 2.0}
    lines = []
    with httpx.stream("POST", f"{url}/v1/best-of-n", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if not lines:
                for pid in replica_pids():
                    os.kill(pid, signal.SIGKILL)
            lines.append(line)
    if "event: result" not in lines:
        assert lines[-3] == "event: error"
        assert "has died; send the request again" in json.loads(lines[-2][6:])["error"]["message"]
    # With no replica left, requests wait for the next one.
    wait(lambda: len(replica_pids()) >= 2, 120)
    assert ask(url, ranking(dice)).status_code == 200


def test_replicas_come_under_load_and_leave_after_it(url, dice):
    wait(lambda: len(replica_pids()) == 2, 120)
    stop = time.monotonic() + 90
    statuses = []

    def client(seed):
        draws = random.Random(seed)
        while time.monotonic() < stop and len(replica_pids()) < 3:
            statuses.append(ask(url, generation(draws, 16)).status_code)

    with ThreadPoolExecutor(60) as clients:
        list(clients.map(client, [dice.random() for _ in range(60)]))
    assert len(replica_pids()) == 3
    assert set(statuses) == {200}
    wait(lambda: len(replica_pids()) == 2, 120)
    assert ask(url, ranking(dice)).status_code == 200


def command_fails(*options):
    """What `bonnx serve` says when it does not start."""
    command = [sys.executable, "-m", "bonnx", "serve", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr


def test_what_cannot_start(countdown):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"{port} of 127.0.0.1 is in use" in command_fails(countdown, "--ray", "--port", port)
    assert "expected a number from 1 on, got 0" in command_fails(countdown, "--ray", "--port", 0)
    nowhere = f"127.0.0.1:{free_port()}"
    assert f"there is no cluster at {nowhere}" in command_fails(countdown, "--ray", "--ray-address", nowhere)
    assert "replicas: expected at least 1; got 0" in command_fails(countdown, "--ray", "--replicas", 0)


class Context:
    replica_id = SimpleNamespace(unique_id="here")


async def replica_of(app, monkeypatch):
    """A replica, outside of Ray, whose application is this one."""
    monkeypatch.setattr("ray.serve.get_replica_context", Context)
    monkeypatch.setattr("bonnx.runtime.serve.cluster.replica.open_engine", lambda *_, **__: None)
    monkeypatch.setattr("bonnx.runtime.serve.cluster.replica.log_to_stderr", lambda: None)
    monkeypatch.setattr("bonnx.runtime.serve.cluster.replica.create_app", lambda *_: app)
    # Ray awaits it; the garbage collector does not.
    monkeypatch.delattr(Replica, "__del__")
    replica = Replica.__new__(Replica)
    await replica.__init__("", Settings(), "cpu", 1, None, None)
    return replica


@pytest.mark.parametrize("sent", [1, 3])
def test_a_replica_learns_that_the_client_has_left(sent, monkeypatch):
    log = []

    async def endpoint(scope, receive, send):
        assert (await receive())["body"] == b"body"
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def endless():
            for i in range(10**6):
                log.append(i)
                await send({"type": "http.response.body", "body": b"", "more_body": True})
                # A real model gives way to the event loop, too.
                await asyncio.sleep(0)

        sending = asyncio.ensure_future(endless())
        log.append((await receive())["type"])
        sending.cancel()

    async def run():
        app = Starlette(routes=[Mount("", endpoint)])
        replica = await replica_of(app, monkeypatch)
        scope = {"type": "http", "path": "/", "method": "POST", "headers": [], "query_string": b""}
        messages = replica.answer(Forwarded(scope, b"body", b""))
        for i in range(sent):
            head, *body = await anext(messages)
            assert i or ((b"x-replica", b"here") in head["headers"] and body)
        await asyncio.sleep(0.05)
        # It has not run ahead of its reader.
        assert len(log) <= sent + 2
        await messages.aclose()
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert "http.disconnect" in log


def test_the_key_of_a_prompt(dice):
    prompt, other = puzzle(dice), "another"
    key = prompt_key(json.dumps({"prompt": prompt, "n": 4}).encode())
    assert key
    assert key == prompt_key(json.dumps({"candidates": ["a", "b"], "prompt": prompt}).encode())
    assert key != prompt_key(json.dumps({"prompt": other, "n": 4}).encode())
    turns = [{"role": r, "content": f"{r} {i}"} for i, r in enumerate(["system", "user", "assistant", "user"])]
    begun, further = ({"messages": turns[:n]} for n in (2, 4))
    assert prompt_key(json.dumps(begun).encode()) == prompt_key(json.dumps(further).encode())
    assert prompt_key(json.dumps({"messages": turns[:1]}).encode()) != prompt_key(json.dumps(begun).encode())
    assert prompt_key(json.dumps({"query": "q", "documents": ["d"]}).encode())
    for body in (b"", b"{", b"[1]", b"3", b'{"prompt": "\xff"}', b"{}", b'{"prompt": ' + b"[" * 10000):
        assert prompt_key(body) in (b"", prompt_key(body))
    for body in (b"", b"{", b"[1]", b"{}"):
        assert prompt_key(body) == b""


def test_a_replica_that_leaves_moves_only_its_own_prompts(dice):
    ids = [f"{dice.randrange(2**40):x}" for _ in range(dice.randrange(2, 12))]
    gone = dice.randrange(len(ids))
    left = [name for name in ids if name != ids[gone]]
    homes = defaultdict(int)
    for _ in range(400):
        key = dice.randbytes(16)
        first, *_ = order_of_preference(key, ids, [0] * len(ids))
        homes[first] += 1
        again, *_ = order_of_preference(key, left, [0] * len(left))
        assert first == gone or left[again] == ids[first]
    assert len(homes) == len(ids)


def test_a_busy_replica_gives_its_prompts_to_the_others(dice):
    ids = ["a", "b", "c", "d"]
    key = dice.randbytes(16)
    order = order_of_preference(key, ids, [0, 0, 0, 0])
    waiting = [3, 3, 3, 3]
    assert order_of_preference(key, ids, waiting) == order
    waiting[order[0]] = 40
    assert order_of_preference(key, ids, waiting) == [*order[1:], order[0]]
    # When all have much to do, the first one is not too busy.
    assert order_of_preference(key, ids, [40, 40, 40, 40]) == order


@pytest.mark.parametrize(
    "options", [{"replicas": 0}, {"replicas": 3, "most_replicas": 2}, {"cpus": 0}, {"gpus": -1}, {"up_after": -1.0}]
)
def test_bad_scales(options):
    with pytest.raises(InputError, match="expected"):
        Scale(**options)

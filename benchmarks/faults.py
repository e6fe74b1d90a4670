"""Inject faults and report their effects: `python -m benchmarks.faults artifacts/countdown` prints a line for each.

The faults are a killed server, an artifact whose folder or files are replaced while it is served, clients that send or
read slowly, and 64 threads that share one model.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import bonnx
from benchmarks.loading import free_port, load, server
from benchmarks.record import add_output, record
from benchmarks.serve import bodies
from benchmarks.soak import request, status_of


def ask(port: int, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/best-of-n", data, headers)
    answer = json.loads(urllib.request.urlopen(request, timeout=60).read())
    answer.pop("id")
    return answer


def mixed() -> list[dict[str, Any]]:
    """Draw rankings and generations of which no two are alike."""
    requests = bodies("rank") + bodies("mixed", most_tokens=48)
    random.Random(0).shuffle(requests)
    return requests


def command(artifact: Path | str, port: int) -> list[str]:
    return ["-m", "bonnx", "serve", str(artifact), "--port", str(port)]


def killed(artifact: Path) -> str:
    """Kill the server with SIGKILL under load: clients see only broken connections; a new server answers the same."""
    port, requests = free_port(), mixed()
    with server(command(artifact, port), port, "/health") as process:
        expected = ask(port, requests[0])
        threading.Timer(2.0, process.kill).start()
        result = load(port, "/v1/best-of-n", requests, 32, 3.0)
        process.wait()
    others = {status: count for status, count in result.statuses.items() if status not in (0, 200)}
    with server(command(artifact, port), port, "/health"):
        same = ask(port, requests[0]) == expected
    return f"{result.statuses.get(200, 0)} answers before, {others or 'no'} errors; same answer after restart: {same}"


def replaced(artifact: Path) -> str:
    """Replace the artifact's folder by another artifact while it is served, delete it, and overwrite its files."""
    port, requests = free_port(), bodies("rank")[:8] + bodies("mixed", most_tokens=48)[:8]
    with tempfile.TemporaryDirectory() as place:
        copy, old = Path(place) / "artifact", Path(place) / "old"
        shutil.copytree(artifact, copy)
        with server(command(copy, port), port, "/health"):
            expected = [ask(port, body) for body in requests]
            copy.rename(old)
            shutil.copytree(artifact, copy)
            overwrite(copy)
            swapped = [ask(port, body) for body in requests] == expected
            overwrite(old)
            refused = [refusal(port, body) for body in requests]
            ready = refusal(port, None)
        shutil.rmtree(copy)
        shutil.copytree(artifact, copy)
        with server(command(copy, port), port, "/health"):
            shutil.rmtree(copy)
            gone = [ask(port, body) for body in requests] == expected
    return (
        f"same answers after the folder was replaced: {swapped}, and deleted: {gone}; after its files were "
        f"overwritten, {refused.count(503)} of {len(requests)} refused with 503, health {ready}"
    )


def overwrite(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                file.write(b"\x3f" * path.stat().st_size)


def refusal(port: int, body: dict[str, Any] | None) -> int:
    """Return the status of the answer to a request, or of the server's health if there is no body."""
    try:
        if body is not None:
            ask(port, body)
        else:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60)
    except urllib.error.HTTPError as e:
        return e.code
    return 200


def slow(artifact: Path) -> str:
    """Connect 200 clients that send single bytes slowly, or never read their answers."""
    port, requests = free_port(), mixed()
    with server(command(artifact, port), port, "/health") as process:
        load(port, "/v1/best-of-n", requests, 8, 1.0)
        alone = load(port, "/v1/best-of-n", requests, 8, 4.0)
        stop, whole = threading.Event(), request(json.dumps(bodies("generate")[0] | {"stream": True}).encode())
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        for connection in connections[::2]:
            connection.sendall(whole * 3)

        def drip() -> None:
            place = 0
            while not stop.wait(0.5):
                for connection in connections[1::2]:
                    try:
                        connection.sendall(whole[place : place + 1])
                    except OSError:
                        continue
                place += 1

        dripping = threading.Thread(target=drip)
        dripping.start()
        disturbed = load(port, "/v1/best-of-n", requests, 8, 12.0)
        stop.set()
        dripping.join()
        closed = sum(_is_closed(connection) for connection in connections[1::2])
        for connection in connections:
            connection.close()
        time.sleep(1)
        after = status_of(process.pid)
    share = disturbed.statuses.get(200, 0) / sum(disturbed.statuses.values())
    return (
        f"p99 of 8 other clients {1e3 * alone.percentile(0.99):.0f} ms without the slow ones, "
        f"{1e3 * disturbed.percentile(0.99):.0f} ms with them, {share:.0%} answered; {closed} of 100 slow senders were "
        f"disconnected; {after['files']} open files"
    )


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.2)
    try:
        while part := connection.recv(65536):
            if not part:
                return True
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def shared(artifact: Path) -> str:
    """Share one model among 64 threads, and compare every answer with that of a single thread."""
    model = bonnx.load(artifact)

    def answer(number: int) -> Any:
        if number < 192:
            body = bodies("rank")[number]
            return model.rank(body["prompt"], body["candidates"]).candidate_scores.tolist()
        options = bodies("mixed", most_tokens=48)[number]
        return [candidate.text for candidate in model.generate(**options).candidates]

    numbers = range(256)
    expected = [answer(number) for number in numbers]
    with ThreadPoolExecutor(64) as pool:
        answers = [*pool.map(answer, numbers)]
    same = sum(a == b for a, b in zip(answers, expected, strict=True))
    pairs = zip(answers[:192], expected[:192], strict=True)
    worst = max(float(np.abs(np.subtract(a, b)).max()) for a, b in pairs)
    return f"{same} of {len(numbers)} answers bitwise equal; maximum difference of a score {worst:g}"


def main() -> None:
    """Print the effect of each fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument(
        "--only", nargs="+", choices=["killed", "replaced", "slow", "shared"], help="faults to inject (default: all)"
    )
    add_output(parser)
    arguments = parser.parse_args()
    for fault in (killed, replaced, slow, shared):
        if arguments.only is None or fault.__name__ in arguments.only:
            result = fault(arguments.artifact)
            print(f"{fault.__name__}: {result}", flush=True)
            record("faults", [{"fault": fault.__name__, "result": result}], path=arguments.output)


if __name__ == "__main__":
    main()

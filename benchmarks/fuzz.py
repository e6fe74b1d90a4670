"""Malformed requests: does any of them get a 5xx, or make the server grow?

`python -m benchmarks.fuzz artifacts/countdown` sends 10,000 (`--requests`): by schemathesis from the OpenAPI page (it
needs `pip install schemathesis`), and raw bytes, which are good requests spoilt: cut, with bytes changed, wrong
lengths, deep nesting, huge numbers, broken text, broken chunks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import urllib.request
from collections import Counter

from benchmarks.loading import free_port, server
from benchmarks.serve import bodies
from benchmarks.soak import request, status_of

PATHS = [
    "/v1/best-of-n",
    "/v1/rerank",
    "/v1/score",
    "/v2/models/countdown_rank/infer",
    "/v2/models/countdown_score/infer",
]
VALUES = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    -0.5,
    "",
    "\x00",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    "9" * 10000,
    {"a": {}},
]


def spoil_json(body: object, rng: random.Random) -> object:
    """Put a strange value somewhere."""
    if isinstance(body, dict) and body and rng.random() < 0.9:
        key = rng.choice([*body])
        return body | {key if rng.random() < 0.9 else rng.choice(["", "x" * 1000, "\x00"]): spoil_json(body[key], rng)}
    if isinstance(body, list) and body and rng.random() < 0.7:
        place = rng.randrange(len(body))
        return [*body[:place], spoil_json(body[place], rng), *body[place + 1 :]]
    return rng.choice(VALUES)


def tensors(rng: random.Random) -> dict[str, object]:
    """Something like a request of the Open Inference Protocol."""
    inputs = []
    for name in ("input_ids", "attention_mask", "num_candidates", "aggregation", "vote", "step_mask", "answer_ids"):
        shape = [] if name in ("num_candidates", "aggregation", "vote") else [2, 3]
        kind = rng.choice(["INT64", "INT64", "INT64", "FP32", "BYTES"])
        inputs.append({"name": name, "shape": shape, "datatype": kind, "data": [1] * (6 if shape else 1)})
    return {"inputs": inputs}


def spoilt(rng: random.Random) -> bytes:
    """One malformed request."""
    path = rng.choice(PATHS)
    body = tensors(rng) if path.startswith("/v2") else rng.choice(bodies("rank", 8) + bodies("generate", 8))
    kind = rng.randrange(8)
    if kind < 3:
        return request(json.dumps(spoil_json(body, rng)).encode(errors="surrogatepass"), path)
    data = bytearray(json.dumps(body).encode())
    if kind == 3:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return request(bytes(data), path)
    if kind == 4:
        return request(bytes(data[: rng.randrange(len(data))]), path)
    if kind == 5:
        return request(rng.choice([b"[", b'{"a":', b"\xff", b'"', b"1"]) * rng.randint(1, 50_000), path)
    whole = bytearray(request(bytes(data), path))
    if kind == 6:
        for _ in range(rng.randint(1, 8)):
            whole[rng.randrange(len(whole))] = rng.randrange(256)
        return bytes(whole)
    wrong = rng.choice([b"-1", b"1e3", b"99999999999999999999", b"3", b"", b"0x10"])
    whole = bytearray(re.sub(rb"Content-Length: \d+", b"Content-Length: " + wrong, bytes(whole)))
    if rng.random() < 0.3:
        chunked = b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + bytes(data)
        whole = bytearray(whole.split(b"\r\n\r\n")[0] + b"\r\n" + chunked)
    return bytes(whole)


async def send(port: int, data: bytes) -> int:
    """The status of the answer; 0 for a connection that was closed without one, -1 for none yet."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        # What is not whole yet waits for its rest: three seconds are enough to see that.
        head = await asyncio.wait_for(reader.readline(), 3)
        return int(head.split(b" ")[1]) if head.startswith(b"HTTP/") else 0
    except asyncio.TimeoutError:
        return -1
    except (OSError, IndexError, ValueError):
        return 0
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def raw(port: int, count: int, statuses: Counter[int]) -> None:
    rng = random.Random()
    slots = asyncio.Semaphore(32)

    async def one() -> None:
        async with slots:
            statuses[await send(port, spoilt(rng))] += 1

    await asyncio.gather(*(one() for _ in range(count)))


def by_schema(port: int, examples: int) -> str:
    """What schemathesis found, its last lines."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json"]
    command += ["--mode", "negative", "--phases", "fuzzing", "--checks", "not_a_server_error"]
    command += ["--max-examples", str(examples), "--workers", "4", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr)[-1500:]


def answered(port: int) -> Counter[str]:
    """Answers by status, as the server counts them."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    statuses: Counter[str] = Counter()
    for status, count in re.findall(r'bonnx_requests_total\{.*status="(\d+)"\} (\S+)', text):
        statuses[status] += int(float(count))
    return statuses


def main() -> None:
    """Print what came of it; exit code 1 for a 5xx."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--requests", type=int, default=10_000)
    arguments = parser.parse_args()
    port = free_port()
    command = ["-m", "bonnx", "serve", arguments.artifact, "--port", str(port), "--body-timeout", "1"]
    with server(command, port, "/health") as process:
        statuses: Counter[int] = Counter()
        asyncio.run(raw(port, 500, statuses))
        before = status_of(process.pid)["VmRSS"]
        print(by_schema(port, max(20, arguments.requests // 25)))
        sent = sum(answered(port).values())
        asyncio.run(raw(port, max(1000, arguments.requests - sent), statuses))
        after = status_of(process.pid)["VmRSS"]
        total = answered(port)
        alive = process.poll() is None
    print("raw bytes, answers by status (0: closed, -1: still waiting for the rest):", dict(sorted(statuses.items())))
    print("all requests that reached the application, by status:", dict(sorted(total.items())))
    print(f"resident memory, MB: {before / 1000:.0f} before, {after / 1000:.0f} after")
    print("the server runs" if alive else "the server DIED")
    raise SystemExit(0 if alive and not any(status.startswith("5") for status in total) else 1)


if __name__ == "__main__":
    main()

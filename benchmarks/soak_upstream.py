"""Chat completions through an upstream that misbehaves: is the server's memory flat?

`python -m benchmarks.soak_upstream artifacts/countdown` sends 2,000 requests (`--requests`) for the best of 4 or for
a single completion, half of them streamed, to `bonnx serve --upstream`. Each tenth client leaves in the middle. Of the
upstream's answers, which this program gives, each fifth is a broken stream, an error or a page of HTML. After each
tenth of the requests it prints the server's resident memory, threads and open files.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from benchmarks.gateway import serving
from benchmarks.loading import free_port, server
from benchmarks.record import add_output, record
from benchmarks.soak import status_of
from bonnx.models.countdown.puzzle import draw_solution


class FaultyUpstream:
    """Answers with solutions of Countdown, word by word, and each fifth request in another way."""

    def __init__(self) -> None:
        self._rng = random.Random(0)

    async def answer(self, request: Request) -> Response:
        """One answer."""
        n, kind = int((await request.json()).get("n", 1)), self._rng.random()
        if kind < 0.05:
            return JSONResponse({"error": {"message": "busy"}}, 503, {"Retry-After": "0"})
        if kind < 0.1:
            return Response("<html>a gateway speaks</html>", media_type="text/html")
        return StreamingResponse(self._events(n, is_cut=kind < 0.2), media_type="text/event-stream")

    async def _events(self, n: int, *, is_cut: bool) -> AsyncIterator[bytes]:
        texts = [draw_solution(self._rng, 4)[1] for _ in range(n)]
        for place in range(0, max(map(len, texts)) + 4, 4):
            for index, text in enumerate(texts):
                piece, is_last = text[place : place + 4], place < len(text) <= place + 4
                if piece:
                    yield _event({"index": index, "text": piece, "finish_reason": "stop" if is_last else None})
                    if is_last and is_cut:
                        raise ConnectionResetError
            await asyncio.sleep(0.001)
        yield b"data: [DONE]\n\n"


def _event(choice: object) -> bytes:
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


async def ask(client: httpx.AsyncClient, url: str, rng: random.Random) -> str:
    """Send one request: its status, or that the client left."""
    body = {"prompt": draw_solution(rng, 4)[0].prompt, "best_of": rng.choice([1, 4]), "stream": rng.random() < 0.5}
    leaves = rng.random() < 0.1
    with contextlib.suppress(httpx.RemoteProtocolError):
        async with client.stream("POST", url, json=body) as response:
            async for _ in response.aiter_bytes():
                if leaves:
                    return "left"
            return str(response.status_code)
    return "cut"


async def work(
    upstream: FaultyUpstream, ports: tuple[int, int], count: int, clients: int, pid: int
) -> list[dict[str, Any]]:
    """Send the requests, print a line of the table after each tenth, and return the figures."""
    figures: list[dict[str, Any]] = []
    url, rng, start = f"http://127.0.0.1:{ports[0]}/v1/completions", random.Random(1), time.perf_counter()
    answers: collections.Counter[str] = collections.Counter()
    async with serving(upstream, ports[1]), httpx.AsyncClient(timeout=120) as client:  # type: ignore[arg-type]

        async def one(left: list[int]) -> None:
            while left:
                left.pop()
                answers[await ask(client, url, rng)] += 1

        for part in range(11):
            now = status_of(pid)
            cells = [part * count // 10, round(time.perf_counter() - start), now["VmRSS"] // 1000]
            print(f"| {' | '.join(map(str, [*cells, now['Threads'], now['files']]))} |", flush=True)
            figures.append(dict(zip(("requests", "seconds", "megabytes"), cells, strict=True)))
            if part < 10:
                left = [*range(count // 10)]
                await asyncio.gather(*(one(left) for _ in range(clients)))
    print("answers by status:", dict(sorted(answers.items())))
    return [*figures, {"answers": answers}]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    add_output(parser)
    arguments = parser.parse_args()
    ports = free_port(), free_port()
    command = ["-m", "bonnx", "serve", arguments.artifact, "--port", str(ports[0]), "--timeout", "120"]
    # Every prompt is another one: a cache of prompts that is full after the first tenth shows whether the rest grows.
    command += ["--prompt-cache", str(8 * 2**20)]
    command += ["--upstream", f"http://127.0.0.1:{ports[1]}/v1", "--upstream-model", "faulty"]
    with server(command, ports[0], "/health") as process:
        print("| requests | seconds | resident memory, MB | threads | open files |\n|---|---|---|---|---|")
        figures = asyncio.run(work(FaultyUpstream(), ports, arguments.requests, arguments.clients, process.pid))
    record("soak_upstream", figures, path=arguments.output)


if __name__ == "__main__":
    main()

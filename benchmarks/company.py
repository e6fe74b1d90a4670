"""Chats of many clients at once: time to the first token and to the answer, beside other servers.

`python -m benchmarks.company ARTIFACT CHECKPOINT` starts, one after the other, `bonnx serve` with the artifact of a
language model, and `transformers serve --continuous-batching` with the checkpoint that it was exported from (with
`--llama-server PROGRAM --gguf FILE` also llama.cpp's server with the checkpoint in its format), and puts
the same load on each: 64 clients (`--clients`) that each send one chat completion after another and read it as it
comes. No two are alike: prompts of 20 to 200 tokens, at most 8 to 64 new tokens, each with its own seed, temperature
and top-p. bonnx also scores every completion. The third server, `one by one`, is bonnx without joining: each
request is one run, and its only event is the answer.

`--fair` measures something else, on bonnx alone: 16 clients with short requests, first by themselves and then beside
one that asks again and again for 64 candidates of 512 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.loading import free_port, server
from benchmarks.rates import measure_rates
from benchmarks.record import add_output, record

TOPICS = ["rivers", "bread", "maps", "clocks", "gardens", "trains", "whales", "music", "bridges", "tea", "glass"]
FACT = "There are many of them, some are old and some are new, and people have written about them for a long time. "


@dataclass
class Times:
    """What the clients of one server saw, in seconds."""

    firsts: list[float] = field(default_factory=list)
    wholes: list[float] = field(default_factory=list)
    failed: int = 0
    seconds: float = 0.0


def chats(model: str, count: int = 512) -> list[dict[str, Any]]:
    """Draw requests of OpenAI's protocol."""
    rng, drawn = random.Random(0), []
    for _ in range(count):
        text = f"Write a few words about {rng.choice(TOPICS)}. " + FACT * rng.choice([0, 0, 1, 2, 6])
        body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True}
        body |= {"max_tokens": rng.randrange(8, 65), "seed": rng.randrange(2**31)}
        body |= {"temperature": rng.choice([0.3, 0.7, 1.0]), "top_p": rng.choice([1.0, 0.9])}
        drawn.append(body)
    return drawn


async def _ask(port: int, path: str, body: dict[str, Any], times: Times) -> None:
    """Send a request and read the events of its answer."""
    data, start = json.dumps(body).encode(), time.perf_counter()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**26)
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + data)
        first, refused = None, b" 200 " not in await reader.readline()
        while line := await reader.readline():
            if first is None and (b'"content": "' in line or b'"content":"' in line or b"progress" in line):
                first = time.perf_counter() - start
        whole = time.perf_counter() - start
        writer.close()
        if refused:
            times.failed += 1
            return
        times.wholes.append(whole)
        times.firsts.append(whole if first is None else first)
    except (OSError, ValueError):
        times.failed += 1
        await asyncio.sleep(0.05)


async def _load(port: int, path: str, bodies: list[dict[str, Any]], clients: int, seconds: float) -> Times:
    times, start = Times(), time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() < start + seconds:
            await _ask(port, path, bodies[number % len(bodies)], times)
            number += clients

    await asyncio.gather(*(client(i) for i in range(clients)))
    times.seconds = time.perf_counter() - start
    return times


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def measure(name: str, arguments: argparse.Namespace) -> Times:
    """Start a server and put the load on it."""
    port = free_port()
    commands = {
        "bonnx serve": [
            "-m",
            "bonnx",
            "serve",
            arguments.artifact,
            "--port",
            str(port),
            "--timeout",
            "600",
            "--served-model-name",
            "model",
        ],
        "one by one": ["-m", "benchmarks.plain_server", arguments.artifact, str(port)],
        "transformers": ["-c", "from transformers.cli.transformers import main; main()", "serve"],
        "llama.cpp": ["--parallel", str(arguments.clients), "--port", str(port), "--threads", str(os.cpu_count() or 1)],
    }
    command = commands[name]
    if name == "transformers":
        command += ["--continuous-batching", "--device", "cpu", "--dtype", "float32", "--port", str(port)]
        command.append(arguments.checkpoint)
    program = sys.executable
    if name == "llama.cpp":
        program = arguments.llama_server
        # Enough for the longest prompt and answer of each client.
        command += ["--model", arguments.gguf, "--ctx-size", str(512 * arguments.clients), "--no-webui"]
    model = arguments.checkpoint if name == "transformers" else "model"
    bodies, path = chats(model), "/v1/chat/completions"
    if name == "bonnx serve":
        bodies = [body | {"best_of": 1} for body in bodies]
    with server(command, port, "/health", only_200=name == "llama.cpp", program=program):
        asyncio.run(_load(port, path, bodies, 4, 1.0))
        return asyncio.run(_load(port, path, bodies, arguments.clients, arguments.seconds))


def fair(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Short requests of 16 clients by themselves, and beside one that asks for a lot; prints both."""
    port = free_port()
    command = ["-m", "bonnx", "serve", arguments.artifact, "--port", str(port), "--timeout", "600"]
    path, many = "/v1/best-of-n", {"prompt": "Write a story.", "n": 64, "max_new_tokens": 512, "stop": []}
    short = [
        {"prompt": f"Write about {topic}.", "n": 1, "max_new_tokens": 16, "seed": i} for i, topic in enumerate(TOPICS)
    ]
    figures = []

    async def beside() -> Times:
        lasting = asyncio.ensure_future(_ask(port, path, many | {"stream": True}, Times()))
        await asyncio.sleep(5)
        times = await _load(port, path, short, 16, arguments.seconds)
        assert not lasting.done(), "the large request ended too early"
        lasting.cancel()
        return times

    print("| 16 clients | requests | p50, s | p99, s |\n|---|---|---|---|")
    with server(command, port, "/health"):
        asyncio.run(_load(port, path, short, 4, 1.0))
        ways = {"alone": lambda: _load(port, path, short, 16, arguments.seconds), "beside 64 of 512": beside}
        for name, load in ways.items():
            times = asyncio.run(load())
            p50, p99 = (_percentile(times.wholes, share) for share in (0.5, 0.99))
            print(f"| {name} | {len(times.wholes)} | {p50:.2f} | {p99:.2f} |", flush=True)
            figures.append({"way": name, "requests": len(times.wholes), "p50": p50, "p99": p99, "failed": times.failed})
    return figures


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60, help="of a load (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--llama-server", metavar="PROGRAM", help="llama.cpp's server, to measure it, too")
    parser.add_argument("--gguf", metavar="FILE", help="the checkpoint for llama.cpp's server")
    parser.add_argument("--fair", action="store_true", help="measure fairness instead")
    add_output(parser)
    arguments = parser.parse_args()
    if arguments.fair:
        record("company-fair", fair(arguments), rates=measure_rates(os.cpu_count() or 1), path=arguments.output)
        return
    names = ["bonnx serve", "one by one", *(["transformers"] if arguments.checkpoint else [])]
    names += ["llama.cpp"] if arguments.llama_server else []
    runs: dict[str, list[Times]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name in names:
            runs[name].append(measure(name, arguments))
    columns = ["server", "requests/s", "first token, p50, s", "p99", "answer, p50, s", "p99", "failed"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    figures = []
    for name, times in runs.items():
        rate = statistics.median(len(each.wholes) / each.seconds for each in times)
        cells = [
            statistics.median(_percentile(values, share) for values in part)
            for part in ([each.firsts for each in times], [each.wholes for each in times])
            for share in (0.5, 0.99)
        ]
        failed = sum(each.failed for each in times)
        print(f"| {name} | {rate:.2f} | {' | '.join(f'{cell:.2f}' for cell in cells)} | {failed} |", flush=True)
        parts = dict(zip(("first_p50", "first_p99", "answer_p50", "answer_p99"), cells, strict=True))
        figures.append(
            {"way": name, "clients": arguments.clients, "requests_per_second": rate, "failed": failed} | parts
        )
    record("company", figures, rates=measure_rates(os.cpu_count() or 1), path=arguments.output)


if __name__ == "__main__":
    main()

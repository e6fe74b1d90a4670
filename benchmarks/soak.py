"""An hour of requests in minutes: is the server's memory flat?

`python -m benchmarks.soak artifacts/countdown` sends 36,000 requests (`--requests`), as many as in an hour at 10 per
second, of every kind: rankings, votes, generations with options of their own, streams, clients that disconnect, and bad
input. After each tenth it prints the process's resident memory, threads and open files.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import time
from pathlib import Path

from benchmarks.loading import Load, _answer, free_port, server
from benchmarks.record import add_output, record
from benchmarks.serve import bodies


def status_of(pid: int) -> dict[str, int]:
    """Return a process's resident memory in kB, and its numbers of threads and open files."""
    text = Path(f"/proc/{pid}/status").read_text()
    status = {name: int(re.search(rf"{name}:\s+(\d+)", text)[1]) for name in ("VmRSS", "Threads")}  # type: ignore[index]
    return status | {"files": len([*Path(f"/proc/{pid}/fd").iterdir()])}


def request(body: bytes, path: str = "/v1/best-of-n") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def client(port: int, numbers: asyncio.Queue[int], answers: Load) -> None:
    rng = random.Random(id(answers))
    ranks, generations = bodies("rank"), bodies("generate") + bodies("mixed", most_tokens=32)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while not numbers.empty():
        numbers.get_nowait()
        kind = rng.random()
        if kind < 0.75:
            body, path = {**rng.choice(ranks)}, "/v1/best-of-n"
            if kind < 0.2:
                body |= {"vote": "weighted", "answers": [rng.choice("ab") for _ in body["candidates"]]}
            elif kind < 0.3:
                body, path = {"query": body["prompt"], "documents": body["candidates"]}, "/v1/rerank"
            data = request(json.dumps(body).encode(), path)
        elif kind < 0.85:
            body = rng.choice(generations) | {"seed": rng.randrange(3)}
            # A stop text of several tokens: such a generation joins and leaves at any token.
            body |= {"stop": ["=1;"]} if rng.random() < 0.5 else {}
            data = request(json.dumps(body).encode())
        elif kind < 0.95:
            data = request(rng.choice([b"{", b"[]", b'{"prompt": 3}', b'{"prompt": "what?", "n": 2}']))
        else:
            # A client that streams or waits, and disconnects.
            body = rng.choice(generations) | ({"stream": True} if kind < 0.98 else {})
            writer.write(request(json.dumps(body).encode()))
            await asyncio.sleep(0.01 * rng.random())
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            continue
        writer.write(data)
        status, _, stays = await _answer(reader)
        answers.statuses[status] = answers.statuses.get(status, 0) + 1
        if not stays:
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()


async def work(port: int, count: int, clients: int, answers: Load) -> None:
    numbers: asyncio.Queue[int] = asyncio.Queue()
    for i in range(count):
        numbers.put_nowait(i)
    await asyncio.gather(*(client(port, numbers, answers) for _ in range(clients)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--requests", type=int, default=36_000)
    parser.add_argument("--clients", type=int, default=16)
    add_output(parser)
    arguments = parser.parse_args()
    port, answers = free_port(), Load(0.0)
    with server(["-m", "bonnx", "serve", arguments.artifact, "--port", str(port)], port, "/health") as process:
        print("| requests | seconds | resident memory, MB | threads | open files |\n|---|---|---|---|---|")
        start, figures = time.perf_counter(), []
        for part in range(11):
            now = status_of(process.pid)
            cells = [part * arguments.requests // 10, round(time.perf_counter() - start), now["VmRSS"] // 1000]
            print(f"| {' | '.join(map(str, [*cells, now['Threads'], now['files']]))} |", flush=True)
            figures.append(dict(zip(("requests", "seconds", "megabytes"), cells, strict=True)))
            if part < 10:
                asyncio.run(work(port, arguments.requests // 10, arguments.clients, answers))
    print("answers by status:", dict(sorted(answers.statuses.items())))
    record("soak", [*figures, {"answers": answers.statuses}], path=arguments.output)


if __name__ == "__main__":
    main()

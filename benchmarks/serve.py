"""`bonnx serve` under load, beside the same model behind a plain server in which each request is one run.

`python -m benchmarks.serve artifacts/countdown` prints requests per second and the 50th, 95th and 99th percentile of
their times, in ms, for 1, 8 and 64 clients that each send one request after another. The servers run one at a time, in
turns; medians of the repeats. The clients share the machine with the server.

`--work shared` is another model, random, of Countdown's size: rankings of one candidate of 32 tokens each, 16 of them
after the same prompt of 384, as workers send them that each score what they made.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.loading import Load, free_port, load, server
from bonnx.models.countdown.puzzle import draw_solution

WORK = ("rank", "generate", "shared")


def bodies(work: str, count: int = 256) -> list[dict[str, Any]]:
    """Countdown puzzles: 4 candidates to rank after each, or 4 to generate."""
    rng = random.Random(0)
    if work == "shared":
        draw = lambda length: [rng.randrange(1000) for _ in range(length)]  # noqa: E731
        prompts = [draw(384) for _ in range(count // 16)]
        return [{"prompt": prompts[i // 16], "candidates": [draw(32)]} for i in range(count)]
    requests = []
    for _ in range(count):
        puzzle, solution = draw_solution(rng, 4)
        if work == "generate":
            requests.append({"prompt": puzzle.prompt, "n": 4})
        else:
            candidates = [solution, *(draw_solution(rng, 4)[1] for _ in range(3))]
            requests.append({"prompt": puzzle.prompt, "candidates": candidates})
    return requests


def random_model(folder: Path) -> str:
    """An artifact that takes ids: what is measured does not depend on its weights."""
    import torch

    from bonnx.export.artifact import export_model
    from bonnx.models.config import LanguageModelConfig, NetworkConfig
    from bonnx.models.network import LanguageModel

    torch.manual_seed(0)
    config = LanguageModelConfig(network=NetworkConfig(embed_dim=256), vocab_size=1000, vocabulary_head=False)
    export_model(LanguageModel(config).eval(), folder / "random", name="random")
    return str(folder / "random")


def measure(name: str, artifact: str, work: str, arguments: argparse.Namespace) -> Iterator[tuple[int, Load]]:
    """One server under each load."""
    port, requests = free_port(), bodies(work)
    command = ["-m", "bonnx", "serve", artifact, "--port", str(port)]
    command += ["--timeout", str(arguments.timeout)]
    if name == "plain":
        command = ["-m", "benchmarks.plain_server", artifact, str(port)]
    with server(command, port, "/health"):
        load(port, "/v1/best-of-n", requests, 8, 1.0)
        for clients in arguments.clients:
            yield clients, load(port, "/v1/best-of-n", requests, clients, arguments.seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=30, help="that a request may take, in seconds")
    arguments = parser.parse_args()
    loads_by_run: dict[tuple[str, int, str], list[Load]] = {}
    with tempfile.TemporaryDirectory() as place:
        other = random_model(Path(place)) if "shared" in arguments.work else None
        for _ in range(arguments.repeats):
            for name in ("bonnx serve", "plain"):
                for work in arguments.work:
                    artifact = other if work == "shared" else arguments.artifact
                    for clients, measured in measure(name, artifact, work, arguments):
                        loads_by_run.setdefault((work, clients, name), []).append(measured)
    print("| work | clients | server | requests/s | times plain | p50, ms | p95, ms | p99, ms | not answered |")
    print("|---|---|---|---|---|---|---|---|---|")
    for work in arguments.work:
        for clients in arguments.clients:
            plain = statistics.median(m.rate for m in loads_by_run[work, clients, "plain"])
            for name in ("bonnx serve", "plain"):
                loads = loads_by_run[work, clients, name]
                rate = statistics.median(m.rate for m in loads)
                times = [1e3 * statistics.median(m.percentile(q) for m in loads) for q in (0.5, 0.95, 0.99)]
                lost = sum(count for m in loads for status, count in m.statuses.items() if status != 200)
                cells = [work, str(clients), name, f"{rate:.0f}", f"{rate / plain:.2f}", *(f"{t:.1f}" for t in times)]
                print(f"| {' | '.join(cells)} | {lost} |")


if __name__ == "__main__":
    main()

"""`bonnx serve` under load, compared with a plain server for the same model in which each request is one run.

`python -m benchmarks.serve artifacts/countdown` prints requests per second, the 50th, 95th and 99th percentile of
latency, in ms, and the server's processor time for a request, for 1, 8 and 64 clients that each send one request after
another. The servers alternate, one running at a time; the figures are medians of the repeats. The clients run on the
same machine as the server; processor time is what other work on it changes least. `--one-by-one` adds a third server:
bonnx serve that joins nothing and keeps nothing.

`shared` and `system` take ids, by default of a random model of Countdown's size; `--ids` names another artifact.
`shared`: each request ranks one candidate of 32 tokens, and 16 requests share a prompt of 384 tokens, as when each
worker of a pool scores its own completion. `system`: 4 candidates of 16 tokens after 512 tokens that all prompts begin
with and 32 of its own; `judge`: the same, but one candidate of 32 tokens.

`--work mixed` generates for requests of which no two are alike: prompts of different lengths, 1 to 16 candidates of at
most 8 to 64 tokens (`--most-tokens`), each with its own seed, temperature and top-p.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.loading import Load, free_port, load, processor_seconds, server
from benchmarks.rates import measure_rates
from benchmarks.record import add_output, record
from bonnx.models.countdown.puzzle import draw_solution

WORK = ("rank", "generate", "shared", "system", "judge", "mixed")
# These rank ids.
IDS = ("shared", "system", "judge")
SERVERS = ("bonnx serve", "plain")
ONE_BY_ONE = "one by one"


def bodies(work: str, count: int = 256, most_tokens: int = 64) -> list[dict[str, Any]]:
    """Draw requests for Countdown puzzles, with 4 candidates to rank or 4 to generate; or of random ids."""
    rng = random.Random(0)
    if work == "mixed":
        return [
            {
                "prompt": draw_solution(rng, 4)[0].prompt,
                "n": rng.choice([1, 1, 2, 4, 8, 16]),
                "max_new_tokens": rng.randrange(8, most_tokens + 1),
                "seed": rng.randrange(2**53),
                "temperature": rng.choice([0.0, 0.7, 1.0, 1.3]),
                "top_p": rng.choice([1.0, 0.9]),
            }
            for _ in range(count)
        ]
    draw = lambda length: [rng.randrange(1000) for _ in range(length)]  # noqa: E731
    if work in ("system", "judge"):
        beginning, (candidates, length) = draw(512), (4, 16) if work == "system" else (1, 32)
        return [
            {"prompt": beginning + draw(32), "candidates": [draw(length) for _ in range(candidates)]}
            for _ in range(count)
        ]
    if work == "shared":
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
    """Export a model with random weights, on which the measurements do not depend."""
    import torch

    from bonnx.export.artifact import export_model
    from bonnx.models.config import LanguageModelConfig, NetworkConfig
    from bonnx.models.network import LanguageModel

    torch.manual_seed(0)
    config = LanguageModelConfig(network=NetworkConfig(embed_dim=256), vocab_size=1000, vocabulary_head=False)
    export_model(LanguageModel(config).eval(), folder / "random", name="random")
    return str(folder / "random")


def measure(name: str, artifact: str, work: str, arguments: argparse.Namespace) -> Iterator[tuple[int, Load]]:
    """Measure one server with each number of clients."""
    port, requests = free_port(), bodies(work, most_tokens=arguments.most_tokens)
    command = ["-m", "bonnx", "serve", artifact, "--port", str(port)]
    command += ["--timeout", str(arguments.timeout)]
    if name == ONE_BY_ONE:
        command += ["--batch-tokens", "1", "--batch-candidates", "1", "--prompt-cache", "0"]
    elif name == "plain":
        command = ["-m", "benchmarks.plain_server", artifact, str(port)]
    with server(command, port, "/health") as process:
        load(port, "/v1/best-of-n", requests, 8, 1.0)
        for clients in arguments.clients:
            begun = processor_seconds(process.pid)
            measured = load(port, "/v1/best-of-n", requests, clients, arguments.seconds)
            measured.processor = processor_seconds(process.pid) - begun
            yield clients, measured


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    parser.add_argument(
        "--seconds", type=float, default=8, help="duration of each measurement, in seconds (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ids", metavar="ARTIFACT", help="what ranks ids; by default a random model")
    parser.add_argument("--one-by-one", action="store_true", help="also measure bonnx serve without joint runs")
    parser.add_argument("--most-tokens", type=int, default=64, help="of a mixed request (default: %(default)s)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=30,
        help="the server's timeout for a request, in seconds (default: %(default)s)",
    )
    add_output(parser)
    arguments = parser.parse_args()
    loads_by_run: dict[tuple[str, int, str], list[Load]] = {}
    with tempfile.TemporaryDirectory() as place:
        ids = arguments.ids
        if ids is None and not {*arguments.work}.isdisjoint(IDS):
            ids = random_model(Path(place))
        servers = (*SERVERS, ONE_BY_ONE) if arguments.one_by_one else SERVERS
        for _ in range(arguments.repeats):
            for work in arguments.work:
                for name in servers:
                    artifact = ids if work in IDS else arguments.artifact
                    for clients, measured in measure(name, artifact, work, arguments):
                        loads_by_run.setdefault((work, clients, name), []).append(measured)
    figures = []
    print(
        "| work | clients | server | requests/s | relative to plain | p50, ms | p95, ms | p99, ms "
        "| processor, ms a request | failed |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for work in arguments.work:
        for clients in arguments.clients:
            plain = statistics.median(m.rate for m in loads_by_run[work, clients, "plain"])
            for name in servers:
                loads = loads_by_run[work, clients, name]
                rate = statistics.median(m.rate for m in loads)
                times = [1e3 * statistics.median(m.percentile(q) for m in loads) for q in (0.5, 0.95, 0.99)]
                lost = sum(count for m in loads for status, count in m.statuses.items() if status != 200)
                cells = [work, str(clients), name, f"{rate:.3g}", f"{rate / plain:.2f}", *(f"{t:.1f}" for t in times)]
                processor = 1e3 * statistics.median(m.processor / len(m.times) for m in loads)
                cells.append(f"{processor:.2f}")
                print(f"| {' | '.join(cells)} | {lost} |")
                figure = {"way": name, "work": work, "clients": clients, "requests_per_second": rate, "failed": lost}
                figure["processor_ms"] = processor
                figures.append(figure | dict(zip(("p50_ms", "p95_ms", "p99_ms"), times, strict=True)))
    record("serve", figures, rates=measure_rates(os.cpu_count() or 1), path=arguments.output)


if __name__ == "__main__":
    main()

"""Rank after long prompts: time and memory of artifacts, compared with transformers.

`python -m benchmarks.long ARTIFACT [ARTIFACT ...] CHECKPOINT` ranks candidates of random tokens after prompts of random
tokens, with each artifact and with transformers (the checkpoint's backbone in float32, sdpa, the prompt's cache shared
by all candidates). Each has a process of its own, and they take turns; a time is the median, and memory the largest
resident set of a call above that of the loaded model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

import bonnx

from .rates import measure_rates, show
from .record import add_output, record

TRANSFORMERS = "transformers float32"
# Prompt, candidates, and tokens of each.
CASES = [(512, 4, 64), (2048, 4, 64), (4096, 4, 64), (8000, 4, 64), (2048, 16, 1024)]
Ranker: TypeAlias = Callable[[list[int], list[list[int]]], Any]


def of_bonnx(folder: str, threads: int) -> Ranker:
    """Rank with an artifact."""
    model = bonnx.load(folder, provider="cpu", threads=threads)
    return lambda prompt, candidates: model.rank(prompt, candidates)


def of_transformers(folder: str, threads: int) -> Ranker:
    """Compute the hidden state of the candidates' last tokens, from which a head would make the scores."""
    from transformers import AutoModel, DynamicCache

    torch.set_num_threads(threads)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def rank(prompt: list[int], candidates: list[list[int]]) -> Any:
        cache = DynamicCache(config=model.config)
        model(torch.tensor([prompt]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(candidates))
        return model(torch.tensor(candidates), past_key_values=cache, use_cache=True).last_hidden_state[:, -1]

    return rank


def work(kind: str, folder: str, threads: int) -> None:
    """Rank what comes on standard input, and answer with seconds and megabytes."""
    rank = (of_transformers if kind == TRANSFORMERS else of_bonnx)(folder, threads)
    # Reads the weights into memory.
    rank([10] * 16, [[10] * 4])
    before = resident("VmRSS")
    for line in sys.stdin:
        prompt, candidates = json.loads(line)
        # The largest resident set is counted from here on.
        Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        rank(prompt, candidates)
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, (resident("VmHWM") - before) / 1000]), flush=True)


def resident(field: str) -> float:
    """A field of this process's status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field))


class Worker:
    """A process that ranks."""

    def __init__(self, kind: str, folder: str, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.long", "--work", kind, "--threads", str(threads), folder, folder]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def __call__(self, prompt: list[int], candidates: list[list[int]]) -> tuple[float, float]:
        """Return seconds and megabytes of one ranking."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([prompt, candidates]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args} ended with status {self.process.wait()}")
        seconds, megabytes = json.loads(answer)
        return seconds, megabytes


def main() -> None:
    """Print the table, and record it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder in the format of transformers")
    parser.add_argument("--prompts", type=int, nargs="+", help="only these lengths of the prompt")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    add_output(parser)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.checkpoint, options.threads)
        return
    rates = measure_rates(options.threads)
    print(show(rates), flush=True)
    names = {f"bonnx {Path(artifact).name}": artifact for artifact in options.artifacts}
    workers = {name: Worker(name, folder, options.threads) for name, folder in names.items()}
    workers[TRANSFORMERS] = Worker(TRANSFORMERS, options.checkpoint, options.threads)
    rng = np.random.default_rng(0)
    print(f"\n| prompt | candidates | {' | '.join(f'{name}, s | MB' for name in workers)} |")
    print(f"|---|---|{'---|---|' * len(workers)}")
    for prompt, count, length in CASES:
        if options.prompts and prompt not in options.prompts:
            continue
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
        for repeat in range(options.repeats + 1):
            tokens = rng.integers(10, 10_000, prompt).tolist()
            candidates = rng.integers(10, 10_000, (count, length)).tolist()
            for name, worker in workers.items():
                one = worker(tokens, candidates)
                measured[name] += [one] if repeat else []
        figures = [
            {
                "way": name,
                "model": Path(options.checkpoint).name,
                "prompt": prompt,
                "n": count,
                "length": length,
                "seconds": statistics.median(seconds for seconds, _ in values),
                "megabytes": statistics.median(megabytes for _, megabytes in values),
            }
            for name, values in measured.items()
        ]
        record("long", figures, rates=rates, path=options.output)
        base = figures[-1]["seconds"]
        cells = [f"{f['seconds']:.2f} ({f['seconds'] / base:.2f}) | {f['megabytes']:.0f}" for f in figures]
        print(f"| {prompt} | {count} of {length} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

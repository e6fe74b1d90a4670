"""What the graphs of an artifact take when they are loaded: time, and memory with and without `cache_dir`.

    python -m benchmarks.memory ARTIFACT ...

Each way loads an artifact in a process of its own, ranks, and then uses every other graph; a second process does the
same while the first one lives. The ways take turns, and the figures are medians. Memory is the proportional set size
of Linux: a page that several mappings share counts once, divided among them. Files that are mapped count too, if their
pages were read.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bonnx.runtime.artifact.folder import WEIGHTS, read_manifest

from .rates import measure_rates
from .record import add_output, record

# Prints the seconds until the first ranking is there, then waits for a line at each step.
CHILD = """
import sys, time
start = time.perf_counter()
import numpy as np
import bonnx
path, cache, threads = sys.argv[1:]
model = bonnx.load(path, provider="cpu", threads=int(threads), cache_dir=cache or None)
prompt, *candidates = (np.random.default_rng(0).integers(0, 100, length) for length in (64, 16, 16))
print(time.perf_counter() - start if model.rank(prompt, candidates) else 0, flush=True)
model.prepare(prompt)
model.rank(prompt, candidates)
if "generate" in model.manifest.graphs:
    model.generate(prompt, n=2, max_new_tokens=4)
    list(model.stream(prompt, n=2, max_new_tokens=4))
print("ready", flush=True)
sys.stdin.readline()
"""


class Child:
    """A process that has loaded every graph."""

    def __init__(self, artifact: Path, cache: str, threads: int) -> None:
        command = [sys.executable, "-c", CHILD, str(artifact), cache, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.seconds = float(self.process.stdout.readline())
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{artifact} could not be used: see above")

    def megabytes(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3

    def close(self) -> None:
        self.process.communicate("\n")


def measured(artifact: Path, cache: str, threads: int) -> list[float]:
    """Seconds until the first ranking; megabytes of one process, and of two."""
    first = Child(artifact, cache, threads)
    one = first.megabytes()
    second = Child(artifact, cache, threads)
    two = first.megabytes() + second.megabytes()
    first.close()
    second.close()
    return [first.seconds, one, two]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path, metavar="ARTIFACT")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_output(parser)
    arguments = parser.parse_args()
    rates = measure_rates(os.cpu_count() or 1)
    print("| artifact | weights, MB | | first ranking, s | one process, MB | two processes, MB | cache, MB |")
    print("|---|---|---|---|---|---|---|")
    for artifact in arguments.artifacts:
        with tempfile.TemporaryDirectory() as cache:
            # Fills the cache, and the page cache with the files of either way.
            measured(artifact, cache, arguments.threads)
            measured(artifact, "", arguments.threads)
            runs: dict[str, list[list[float]]] = {"": [], cache: []}
            for _ in range(arguments.repeats):
                for way, found in runs.items():
                    found.append(measured(artifact, way, arguments.threads))
            weights = (artifact / "onnx" / WEIGHTS).stat().st_size / 1e6
            size = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file()) / 1e6
        figures: list[dict[str, Any]] = []
        for way, found in runs.items():
            seconds, one, two = np.median(found, axis=0)
            manifest = read_manifest(artifact)
            figure = {
                "way": "cache_dir" if way else "no cache",
                "model": manifest.name,
                "precision": manifest.precision,
            }
            figure |= {"weights_megabytes": weights, "seconds": seconds, "one_megabytes": one, "two_megabytes": two}
            figures.append(figure | ({"cache_megabytes": size} if way else {}))
            cells = [artifact.name, f"{weights:.0f}", figure["way"], f"{seconds:.2f}", f"{one:.0f}", f"{two:.0f}"]
            print("|", " | ".join([*cells, f"{size:.0f}" if way else "-"]), "|", flush=True)
        record("memory", figures, rates=rates, path=arguments.output)


if __name__ == "__main__":
    main()

"""Load and run time at each of ONNX Runtime's optimization levels: `python -m benchmarks.load ARTIFACT`."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from bonnx.export.graphs.selection import plain_selection
from bonnx.runtime.artifact.folder import read_verified

from .rates import measure_rates
from .record import add_output, record

LEVELS = ["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    add_output(parser)
    arguments = parser.parse_args()
    manifest = read_verified(arguments.artifact)
    path = arguments.artifact / manifest.graphs["rank"].file
    feeds = draw(manifest)
    taken: dict[str, tuple[list[float], list[float]]] = {level: ([], []) for level in LEVELS}
    for _ in range(arguments.repeats):
        for level, (loads, runs) in taken.items():
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
            options.log_severity_level = 3
            start = time.perf_counter()
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            loads.append(time.perf_counter() - start)
            session.run(None, feeds)
            start = time.perf_counter()
            session.run(None, feeds)
            runs.append(time.perf_counter() - start)
    figures = []
    for level, (loads, runs) in taken.items():
        load, run = float(np.median(loads)), float(np.median(runs))
        figures.append({"way": level, "model": manifest.name, "load_seconds": load, "seconds": run})
        print(f"{level:<16} load {1000 * load:8.1f} ms   run {1000 * run:8.2f} ms")
    record("load", figures, rates=measure_rates(os.cpu_count() or 1), path=arguments.output)


def draw(manifest: Any) -> dict[str, Any]:
    """Draw feeds for 16 candidates of 20 tokens after a prompt of 10."""
    rng, shapes = np.random.default_rng(0), {"prompt": (1, 10), "candidate": (16, 1, 20)}
    feeds: dict[str, Any] = {**plain_selection()}
    for name, shape in shapes.items():
        feeds[f"{name}_mask"] = np.ones(shape, np.int64)
        if manifest.kind == "language_model":
            feeds[f"{name}_ids"] = rng.integers(0, manifest.model["vocab_size"], shape)
        else:
            feeds[f"{name}_embeds"] = rng.standard_normal((*shape, manifest.model["embed_dim"]), np.float32)
    return feeds


if __name__ == "__main__":
    main()

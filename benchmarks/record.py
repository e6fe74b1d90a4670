"""The record of what was measured: one file of JSON lines, to which every benchmark appends its figures.

A line is self-contained: what was run (`benchmark`, `command`, `commit`, and whether the code was `modified`), on what
(`processor`, `flags`, `cores`, the `load` by other work, `versions`, and `rates` of the same run), and `figures`. Lines
with the same `benchmark` and `run` are of one process, so only their figures may be compared as times.
benchmarks/README.md explains the fields.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import bonnx

__all__ = ["MEASUREMENTS", "add_output", "read_runs", "record"]

ROOT = Path(__file__).resolve().parents[1]
MEASUREMENTS = Path(__file__).with_name("measurements.jsonl")
# The flags of an x86 processor that decide which kernels the libraries use.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16")
PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "transformers")
# One for each process: when it began, in UTC.
_RUN = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
# What else kept the machine busy: the mean number of processes that could run, in the minute before this one.
_LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where the figures go."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=MEASUREMENTS,
        metavar="FILE",
        help="JSON lines file to which the figures are appended (default: benchmarks/measurements.jsonl)",
    )


def record(
    benchmark: str,
    figures: Iterable[Mapping[str, Any]],
    *,
    rates: Mapping[str, float] | None = None,
    path: Path = MEASUREMENTS,
) -> None:
    """Append one line with figures of this process. Call it as soon as there are some: what is written is kept.

    Args:
        benchmark: the module's name in `benchmarks`, such as `rank`.
        figures: one mapping for each thing that was measured: what it is (`way`, `n`, `prompt`, `length`, `model`,
            `precision`, ...) and its values (`seconds`, `megabytes`, `share`, ...), with the unit in the name.
        rates: the machine's rates, as `benchmarks.rates.measure_rates` measured them in this process; None for figures
            that are no times.
        path: the file.
    """
    line = {"benchmark": benchmark, "run": _RUN, "command": _command(benchmark), **_host()}
    line |= {"rates": rates and dict(rates), "figures": [dict(figure) for figure in figures]}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_rounded(line)) + "\n")


def read_runs(path: Path = MEASUREMENTS) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the runs by benchmark and time, in the file's order, each with the figures of all its lines."""
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        key = line["benchmark"], line["run"]
        if key in runs:
            runs[key]["figures"] += line["figures"]
        else:
            runs[key] = line
    return runs


@functools.cache
def _host() -> dict[str, Any]:
    """Return what ran, and on what."""
    commit, modified = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".", f":!{MEASUREMENTS}")
    processor, flags = _processor()
    versions = {"python": platform.python_version(), "bonnx": bonnx.__version__}
    return {
        "commit": commit and commit[:12],
        "modified": None if modified is None else bool(modified),
        "processor": processor,
        "flags": flags,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": _LOAD,
        "versions": versions | {name: version for name in PACKAGES if (version := _version(name))},
    }


def _processor() -> tuple[str, list[str]]:
    """Return the processor's name and which of `FLAGS` it has; from /proc/cpuinfo where there is one."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    return fields.get("model name") or platform.processor() or platform.machine(), [f for f in FLAGS if f in flags]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Return what git prints, or None outside a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _command(benchmark: str) -> str:
    """Return the command without the folders of this machine."""
    arguments = (Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *arguments])


def _rounded(value: Any) -> Any:
    """Round every number to five digits, more than any measurement holds; NumPy's become Python's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value

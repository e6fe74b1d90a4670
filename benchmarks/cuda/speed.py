"""Times of `rank` and `generate`, beside PyTorch and transformers on the same device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import bonnx
from bonnx.export import artifact
from bonnx.models.network import LanguageModel
from bonnx.runtime.artifact.manifest import Precision
from bonnx.runtime.engine.placement import place_artifact

from .machine import PRECISIONS, Machine, Size, rates, streamed, timed
from .others import DTYPES, OnDevice, generate_ways, rank_ways, transformers_module

__all__ = ["placed", "speed"]

# Bytes of a weight.
WIDTHS: dict[Precision, int] = {"fp32": 4, "fp16": 2}


def placed(path: Path) -> list[tuple[str, str]]:
    """Show where the nodes of each graph run, by the log of ONNX Runtime."""
    try:
        placements = place_artifact(path)
    except bonnx.ProviderError as e:
        return [(f"placement, {path.name}", str(e))]
    return [
        (
            f"placement, {path.name}, {name}",
            f"{p.cuda} nodes on CUDA, {p.host} shapes and {sum(p.without.values())} without a kernel on the CPU, "
            f"{p.copies} copies and {p.body_copies} in bodies",
        )
        for name, p in placements.items()
    ]


def speed(folder: Path, machine: Machine) -> Iterator[tuple[str, str]]:
    """Time every size at every precision; yield names and results."""
    peak = rates(machine)
    yield "rates", ", ".join(f"{name} {rate:.3g} T/s" for name, rate in peak.items())
    module = transformers_module()
    if module is None:
        yield "transformers", "not installed, so not measured"
    for size in machine.sizes:
        for precision in PRECISIONS:
            path = folder / f"{size.name}-{precision}"
            net = size.model()
            export_unverified(net, path, name=size.name, precision=precision, cuda_graph=True)
            yield from placed(path)
            ours = bonnx.load(path, provider=machine.provider)
            theirs = net.to(machine.provider, DTYPES[precision])
            peer = None if module is None else OnDevice(module, size, machine, precision)
            for count in machine.counts:
                with torch.no_grad():
                    yield _rank(ours, theirs, peer, (size, precision, count), machine, peak)
                    yield _generate(ours, peer, (size, precision, count), machine, peak)
            # Before the next one is loaded beside it.
            ours.close()
            del theirs, peer, net
            if machine.provider == "cuda":
                torch.cuda.empty_cache()


def export_unverified(model: LanguageModel, path: Path, **options: Any) -> None:
    """Export without comparing with PyTorch, which takes minutes at fp16: only times are of interest here.

    Graphs of these kinds are compared by the tests, and by `parity` on the device.
    """
    with (
        mock.patch.object(artifact, "verify_graphs", return_value=[]),
        mock.patch.object(artifact, "measure", return_value=None),
    ):
        artifact.export_model(model, path, **options)


def _rank(
    ours: bonnx.Model,
    theirs: Any,
    peer: OnDevice | None,
    what: tuple[Size, Precision, int],
    machine: Machine,
    peak: dict[str, float],
) -> tuple[str, str]:
    size, precision, count = what
    rng = np.random.default_rng(1)
    prompt = rng.integers(3, size.vocabulary, machine.prompt)
    candidates = rng.integers(3, size.vocabulary, (count, machine.length))
    rows = list(candidates)
    ways = {"bonnx": lambda: ours.rank(prompt, rows)} | rank_ways(theirs, peer, prompt, candidates, machine)
    times = {name: _measured(way, machine) for name, way in ways.items()}
    share = _share(size.rank_work(machine.prompt, count, machine.length) / peak[precision], times["bonnx"])
    name = f"rank {size.name} {precision}, prompt {machine.prompt}, {count} x {machine.length} tokens"
    return name, f"{_shown(times)}; {share} of the matrix rate"


def _generate(
    ours: bonnx.Model,
    peer: OnDevice | None,
    what: tuple[Size, Precision, int],
    machine: Machine,
    peak: dict[str, float],
) -> tuple[str, str]:
    size, precision, count = what
    prompt = np.random.default_rng(1).integers(3, size.vocabulary, machine.prompt)
    options: dict[str, Any] = {"n": count, "max_new_tokens": machine.length, "seed": 0}
    ways: dict[str, Callable[[], Any]] = {
        "bonnx, one graph": lambda: ours.generate(prompt, **options),
        "bonnx, host's loop": lambda: streamed(ours, prompt, static=False, **options),
        "bonnx, host's loop with a static cache": lambda: streamed(ours, prompt, static=True, **options),
    }
    times = {name: _measured(way, machine) for name, way in (ways | generate_ways(peer, prompt, count)).items()}
    read = size.token_bytes(WIDTHS[precision]) / peak["memory"]
    token = max(size.token_work(count) / peak[precision], read)
    floor = size.rank_work(machine.prompt, 0, 0) / peak[precision] + machine.length * token
    share = _share(floor, times["bonnx, host's loop with a static cache"])
    name = f"generate {size.name} {precision}, prompt {machine.prompt}, {count} x {machine.length} tokens"
    return name, f"{_shown(times)}; with a static cache {share} of the matrix and memory rates"


def _failure(error: Exception) -> str:
    first = str(error).splitlines()[:1]
    return f"FAILED ({type(error).__name__}: {''.join(first)[:120]})"


def _measured(way: Callable[[], Any], machine: Machine) -> float | str:
    """The time, or why there is none: one way that fails, such as for memory, is no reason to lose the others."""
    try:
        return timed(way, machine)
    except Exception as e:
        return _failure(e)


def _shown(times: dict[str, float | str]) -> str:
    shown = {name: f"{1000 * t:.2f} ms" if isinstance(t, float) else t for name, t in times.items()}
    return ", ".join(f"{name} {text}" for name, text in shown.items())


def _share(least: float, taken: float | str) -> str:
    """How much of the time taken the least possible time is."""
    return f"{100 * least / taken:.0f}%" if isinstance(taken, float) else "unknown share"

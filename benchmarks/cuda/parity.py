"""Whether CUDA computes what the CPU does: the recorded cases, random ragged cases, generation, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bonnx
from bonnx.export.artifact import export_model
from bonnx.export.checkpoint.tokenizer import read_tokenizer
from bonnx.models import build, load_checkpoint
from bonnx.models.countdown import CHECKPOINT
from bonnx.models.countdown.puzzle import draw_puzzles
from bonnx.runtime.artifact.manifest import Scoring

from .machine import EXPORT, PRECISIONS, Machine, streamed

__all__ = ["parity"]

# Absolute tolerance: TensorFloat-32 products on the GPU keep 10 bits.
TOLERANCE = 5e-3


def parity(folder: Path, machine: Machine) -> Iterator[tuple[str, str]]:
    """Run the recorded cases and random ragged ones; yield names and results."""
    torch.manual_seed(0)
    model, metadata = load_checkpoint(CHECKPOINT)
    scoring = Scoring(**metadata["scoring"])
    names = {}
    tokenizer = read_tokenizer(CHECKPOINT)
    for precision in PRECISIONS:
        names[f"countdown, {precision}"] = path = folder / f"countdown-{precision}"
        options_of_export: dict[str, Any] = {"precision": precision, "cuda_graph": True, **EXPORT}
        export_model(model, path, name="c", scoring=scoring, tokenizer=tokenizer, **options_of_export)
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "sliding window": {"sliding_window": 5},
        "qk norm, one kv head": {"qk_norm": True, "num_kv_heads": 1},
    }
    for i, (name, extra) in enumerate([*options.items()][: machine.kinds]):
        for opset in (18, 23):
            names[f"{name}, opset {opset}"] = folder / f"{i}-{opset}"
            net = build(embed_dim=32, hidden_size=64, num_layers=2, **extra).eval()
            export_model(net, folder / f"{i}-{opset}", name=name, opset=opset, **EXPORT)
    for name, path in names.items():
        try:
            _, checks = bonnx.verify(path, provider=machine.provider)
            worst = max(check.max_difference for check in checks)
            yield f"recorded cases, {name}", f"ok, maximum difference {worst:.1e}"
            if name.startswith("countdown"):
                yield f"generate, {name}", generated(path, machine)
            else:
                yield f"ragged cases, {name}", ragged(path, machine)
        except bonnx.BonnxError as e:
            yield name, f"FAILED: {e}"
    net = build(embed_dim=32, hidden_size=64, num_layers=2).eval()
    export_model(net, folder / "int8", name="int8", precision="int8", **EXPORT)
    yield "int8", refused(folder / "int8")


def generated(path: Path, machine: Machine, count: int = 16) -> str:
    """Count the candidates that are the same on both providers, and with `generate` and the host's loops."""
    rng = random.Random(0)
    puzzles = [puzzle.prompt for puzzle, _ in draw_puzzles(rng, 4, machine.puzzles, test=True)]
    cpu, cuda = bonnx.load(path, provider="cpu"), bonnx.load(path, provider=machine.provider)
    same, steered, static = 0, 0, 0
    for seed, prompt in enumerate(puzzles):
        expected, actual = (m.generate(prompt, n=count, seed=seed).candidates for m in (cpu, cuda))
        loops = [streamed(cuda, prompt, static=each, n=count, seed=seed).candidates for each in (False, True)]
        for a, b, c, d in zip(expected, actual, *loops, strict=True):
            same += np.array_equal(a.tokens, b.tokens)
            steered += np.array_equal(b.tokens, c.tokens)
            static += np.array_equal(b.tokens, d.tokens)
    total = len(puzzles) * count
    # Rounding may change a draw that is close to a boundary; a wrong graph would change nearly all of them.
    verdict = "ok" if min(same, steered, static) > 0.95 * total else "FAILED"
    loops = f"{steered} as in the host's loop, {static} as there with a static cache"
    return f"{verdict}, {same} of {total} as on the CPU, {loops}"


def ragged(path: Path, machine: Machine) -> str:
    """Compare CUDA with the CPU provider, which the export has compared with PyTorch."""
    rng = np.random.default_rng(0)
    cpu, cuda = bonnx.load(path, provider="cpu"), bonnx.load(path, provider=machine.provider)
    worst = 0.0
    for _ in range(machine.cases):
        prompt = rng.standard_normal((int(rng.integers(1, 60)), 32), np.float32)
        candidates = [rng.standard_normal((int(n), 32), np.float32) for n in rng.integers(1, 30, 6)]
        for aggregation in bonnx.AGGREGATIONS:
            a, b = (m.rank(prompt, candidates, aggregation=aggregation) for m in (cpu, cuda))
            worst = max(worst, float(np.abs(a.candidate_scores - b.candidate_scores).max()))
            close = a.candidate_scores[a.best_index] - a.candidate_scores[b.best_index] <= TOLERANCE
            if worst > TOLERANCE or not close:
                return f"FAILED: difference {worst:.1e}, selected {a.best_index} and {b.best_index}"
    return f"ok, maximum difference {worst:.1e}"


def refused(path: Path) -> str:
    """Whether an artifact with 8-bit products is refused on CUDA, and why."""
    try:
        bonnx.load(path, provider="cuda").close()
    except bonnx.ProviderError as e:
        # A machine without CUDA refuses every artifact.
        return f"refused: {e}" if "8-bit products" in str(e) else f"FAILED: {e}"
    return "FAILED: it was loaded"

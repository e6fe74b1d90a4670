"""Run every CUDA parity check and benchmark: `python -m benchmarks.cuda` on a machine with a GPU.

It exports on the CPU, then runs the artifacts with provider="cuda": the recorded cases, random ragged cases against the
CPU provider, and the time of `rank` against PyTorch on the same GPU.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
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
from bonnx.runtime.engine.providers import installed_flavours

from .rank import LENGTH, PROMPT, SharedByHand, draw, network
from .record import add_output, record

# Absolute tolerance: TensorFloat-32 products on the GPU keep 10 bits.
TOLERANCE = 5e-3


def parity(folder: Path) -> list[tuple[str, str]]:
    """Run the recorded cases and random ragged ones; return names and results."""
    torch.manual_seed(0)
    model, metadata = load_checkpoint(CHECKPOINT)
    scoring = Scoring(**metadata["scoring"])
    export_model(model, folder / "countdown", name="c", scoring=scoring, tokenizer=read_tokenizer(CHECKPOINT))
    rows = []
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "sliding window": {"sliding_window": 5},
        "qk norm, one kv head": {"qk_norm": True, "num_kv_heads": 1},
    }
    names = {"countdown": folder / "countdown"}
    for i, (name, extra) in enumerate(options.items()):
        for opset in (18, 23):
            names[f"{name}, opset {opset}"] = folder / f"{i}-{opset}"
            net = build(embed_dim=32, hidden_size=64, num_layers=2, **extra).eval()
            export_model(net, folder / f"{i}-{opset}", name=name, opset=opset)
    for name, path in names.items():
        try:
            _, checks = bonnx.verify(path, provider="cuda")
            worst = max(check.max_difference for check in checks)
            rows.append((f"recorded cases, {name}", f"ok, maximum difference {worst:.1e}"))
            if path.name == "countdown":
                rows.append(("generate, countdown", generated(path)))
            else:
                rows.append((f"ragged cases, {name}", ragged(path)))
        except bonnx.BonnxError as e:
            rows.append((name, f"FAILED: {e}"))
    return rows


def generated(path: Path, prompts: int = 50, count: int = 16) -> str:
    """Count the candidates that are the same on both providers, and with `generate` and the host's loop."""
    rng = random.Random(0)
    puzzles = [puzzle.prompt for puzzle, _ in draw_puzzles(rng, 4, prompts, test=True)]
    cpu, cuda = bonnx.load(path, provider="cpu"), bonnx.load(path, provider="cuda")
    same, steered = 0, 0
    for seed, prompt in enumerate(puzzles):
        expected, actual = (m.generate(prompt, n=count, seed=seed).candidates for m in (cpu, cuda))
        *_, last = cuda.stream(prompt, n=count, seed=seed)
        pairs = list(zip(expected, actual, last.candidates, strict=True))
        same += sum(np.array_equal(a.tokens, b.tokens) for a, b, _ in pairs)
        steered += sum(np.array_equal(b.tokens, c.tokens) for _, b, c in pairs)
    total = len(puzzles) * count
    # Rounding may change a draw that is close to a boundary; a wrong graph would change nearly all of them.
    verdict = "ok" if min(same, steered) > 0.95 * total else "FAILED"
    return f"{verdict}, {same} of {total} as on the CPU, {steered} as in the host's loop"


def ragged(path: Path, cases: int = 20) -> str:
    """Compare CUDA with the CPU provider, which the export has compared with PyTorch."""
    rng = np.random.default_rng(0)
    cpu, cuda = bonnx.load(path, provider="cpu"), bonnx.load(path, provider="cuda")
    worst = 0.0
    for _ in range(cases):
        prompt = rng.standard_normal((int(rng.integers(1, 60)), 32), np.float32)
        candidates = [rng.standard_normal((int(n), 32), np.float32) for n in rng.integers(1, 30, 6)]
        for aggregation in bonnx.AGGREGATIONS:
            a, b = (m.rank(prompt, candidates, aggregation=aggregation) for m in (cpu, cuda))
            worst = max(worst, float(np.abs(a.candidate_scores - b.candidate_scores).max()))
            close = a.candidate_scores[a.best_index] - a.candidate_scores[b.best_index] <= TOLERANCE
            if worst > TOLERANCE or not close:
                return f"FAILED: difference {worst:.1e}, selected {a.best_index} and {b.best_index}"
    return f"ok, maximum difference {worst:.1e}"


def timed(way: Callable[[], Any], repeats: int = 10) -> float:
    """Return the median time in seconds, including the GPU's work."""
    taken = []
    for repeat in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        way()
        torch.cuda.synchronize()
        if repeat > 1:
            taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def speed(folder: Path) -> list[tuple[str, str]]:
    """Time `rank` with the 85M network against PyTorch on the same GPU."""
    net = network()
    export_model(net, folder / "85M", name="85M")
    model = bonnx.load(folder / "85M", provider="cuda")
    rng, rows, gpu = np.random.default_rng(1), [], net.cuda()
    by_hand = SharedByHand(gpu)
    for count in (1, 16, 64, 256):
        prompt, candidates = draw(rng, count)
        p, c = torch.from_numpy(prompt)[None].cuda(), torch.from_numpy(np.stack(candidates)).cuda()
        whole = torch.cat([p.expand(count, -1, -1), c], 1)
        seconds = {"rank": timed(lambda: model.rank(prompt, candidates))}  # noqa: B023
        with torch.no_grad():
            seconds["PyTorch, whole rows"] = timed(lambda: gpu(whole))  # noqa: B023
            seconds["PyTorch by hand, prompt once"] = timed(lambda: by_hand(p, c))  # noqa: B023
        text = ", ".join(f"{name} {1000 * s:.2f} ms" for name, s in seconds.items())
        rows.append((f"prompt {PROMPT}, {count} x {LENGTH} tokens", text))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_output(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device; nothing was measured", file=sys.stderr)
        return 1
    torch.set_default_device("cpu")
    with tempfile.TemporaryDirectory() as name:
        rows = [*parity(Path(name)), *speed(Path(name))]
    width = max(len(name) for name, _ in rows)
    print(f"{torch.cuda.get_device_name()}, {installed_flavours()}\n")
    for name, result in rows:
        print(f"{name:<{width}}  {result}")
    figures = [{"check": name, "result": result, "device": torch.cuda.get_device_name()} for name, result in rows]
    record("cuda", figures, path=arguments.output)
    return int(any("FAILED" in result for _, result in rows))


if __name__ == "__main__":
    sys.exit(main())

"""Run every CUDA parity check and benchmark: `python -m benchmarks.cuda` on a machine with a GPU.

It needs no network: it exports on the CPU, then runs the artifacts with provider="cuda": the recorded cases, random
ragged cases against the CPU provider, and the times of `rank`, against PyTorch on the same GPU, and of `generate`, at
float32 and fp16. It also shows where the nodes are placed. `--dry-run` does all this on the CPU with a small network,
to try the command itself; its times mean nothing.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from bonnx.runtime.artifact.manifest import Precision, Scoring
from bonnx.runtime.engine.placement import place_artifact
from bonnx.runtime.engine.providers import installed_flavours
from bonnx.runtime.engine.session import Provider

from .generate import NEW, language_model
from .rank import LENGTH, PROMPT, SharedByHand, draw, network, work
from .record import add_output, record

# Absolute tolerance: TensorFloat-32 products on the GPU keep 10 bits.
TOLERANCE = 5e-3
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
# What is of interest here is the GPU, not the export.
EXPORT: dict[str, Any] = {"verification": "quick", "min_agreement": 0.0}


@dataclass(frozen=True)
class Machine:
    """Where to run, and how much.

    Attributes:
        provider: of the artifacts.
        layers: of the networks whose time is measured.
        counts: of candidates.
        prompts: of Countdown that are generated for.
        repeats: of each timed call.
        kinds: of networks that are compared.
        cases: of random shapes of each.
    """

    provider: Provider = "cuda"
    layers: int = 12
    counts: tuple[int, ...] = (1, 16, 64, 256)
    prompts: int = 50
    repeats: int = 10
    kinds: int = 3
    cases: int = 20

    @property
    def name(self) -> str:
        """The GPU's, or `cpu`."""
        return str(torch.cuda.get_device_name()) if self.provider == "cuda" else "cpu"


DRY = Machine("cpu", layers=1, counts=(4,), prompts=2, repeats=1, kinds=1, cases=2)


def parity(folder: Path, machine: Machine) -> list[tuple[str, str]]:
    """Run the recorded cases and random ragged ones; return names and results."""
    torch.manual_seed(0)
    model, metadata = load_checkpoint(CHECKPOINT)
    scoring = Scoring(**metadata["scoring"])
    names = {}
    for precision in PRECISIONS:
        names[f"countdown, {precision}"] = path = folder / f"countdown-{precision}"
        options_of_export: dict[str, Any] = {"precision": precision, **EXPORT}
        tokenizer = read_tokenizer(CHECKPOINT)
        export_model(model, path, name="c", scoring=scoring, tokenizer=tokenizer, **options_of_export)
    rows = []
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
            rows.append((f"recorded cases, {name}", f"ok, maximum difference {worst:.1e}"))
            if name.startswith("countdown"):
                rows.append((f"generate, {name}", generated(path, machine)))
            else:
                rows.append((f"ragged cases, {name}", ragged(path, machine)))
        except bonnx.BonnxError as e:
            rows.append((name, f"FAILED: {e}"))
    return rows


def generated(path: Path, machine: Machine, count: int = 16) -> str:
    """Count the candidates that are the same on both providers, and with `generate` and the host's loop."""
    rng = random.Random(0)
    puzzles = [puzzle.prompt for puzzle, _ in draw_puzzles(rng, 4, machine.prompts, test=True)]
    cpu, cuda = bonnx.load(path, provider="cpu"), bonnx.load(path, provider=machine.provider)
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


def timed(way: Callable[[], Any], machine: Machine) -> float:
    """Return the median time in seconds, including the GPU's work."""
    taken = []
    for repeat in range(machine.repeats + 2):
        _wait(machine)
        start = time.perf_counter()
        way()
        _wait(machine)
        if repeat > 1:
            taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def _wait(machine: Machine) -> None:
    if machine.provider == "cuda":
        torch.cuda.synchronize()


def rates(machine: Machine) -> dict[str, float]:
    """Measure what PyTorch's products and copies reach on the device, in TFLOP/s and TB/s."""
    size = 8192 if machine.provider == "cuda" else 256
    device = torch.device(machine.provider)
    # The products of ONNX Runtime's float32 are TensorFloat-32 by default.
    torch.backends.cuda.matmul.allow_tf32 = True
    found = {}
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[name] = 2e-12 * size**3 / timed(lambda: a @ b, machine)  # noqa: B023
    data = torch.empty(size * size * 4, device=device)
    found["memory"] = 2e-12 * 4 * data.numel() / timed(data.clone, machine)
    return found


def speed(folder: Path, machine: Machine) -> list[tuple[str, str]]:
    """Time `rank` with the 85M network against PyTorch on the same GPU, and `generate` with the language model."""
    peak = rates(machine)
    rows = [("rates", ", ".join(f"{name} {rate:.2f} T/s" for name, rate in peak.items()))]
    net, rng = network(machine.layers), np.random.default_rng(1)
    models = {}
    for precision in PRECISIONS:
        path = folder / f"rank-{precision}"
        export_model(net, path, name="85M", precision=precision, **EXPORT)
        rows += placed(path)
        models[precision] = bonnx.load(path, provider=machine.provider)
    device = net.to(machine.provider)
    by_hand = SharedByHand(device)
    for count in machine.counts:
        prompt, candidates = draw(rng, count)
        p, c = (
            torch.from_numpy(x).to(machine.provider) for x in (np.ascontiguousarray(prompt[None]), np.stack(candidates))
        )
        whole = torch.cat([p.expand(count, -1, -1), c], 1)
        seconds = {
            f"rank {precision}": timed(lambda: model.rank(prompt, candidates), machine)  # noqa: B023
            for precision, model in models.items()
        }
        with torch.no_grad():
            seconds["PyTorch, whole rows"] = timed(lambda: device(whole), machine)  # noqa: B023
            seconds["PyTorch by hand, prompt once"] = timed(lambda: by_hand(p, c), machine)  # noqa: B023
        share = 1e-3 * work(machine.layers, count) / seconds["rank fp32"] / peak["float32"]
        text = ", ".join(f"{name} {1000 * s:.2f} ms" for name, s in seconds.items())
        rows.append((f"prompt {PROMPT}, {count} x {LENGTH} tokens", f"{text}, {100 * share:.0f}% of the matrix rate"))
    return rows


def generation_speed(folder: Path, machine: Machine) -> list[tuple[str, str]]:
    """Time `generate` with the 85M language model, in one graph and in the host's loop."""
    rows, prompt = [], np.random.default_rng(1).integers(1, 1000, PROMPT)
    for precision in PRECISIONS:
        path = folder / f"generate-{precision}"
        export_model(language_model(machine.layers), path, name="85M", precision=precision, **EXPORT)
        rows += placed(path)
        model = bonnx.load(path, provider=machine.provider)
        for count in machine.counts:
            options: dict[str, Any] = {"n": count, "max_new_tokens": NEW, "seed": 0}
            seconds = {
                "one graph": timed(lambda: model.generate(prompt, **options), machine),  # noqa: B023
                "host's loop": timed(lambda: [*model.stream(prompt, **options)], machine),  # noqa: B023
            }
            text = ", ".join(f"{name} {1000 * s:.2f} ms" for name, s in seconds.items())
            rows.append((f"generate {precision}, prompt {PROMPT}, {count} x {NEW} tokens", text))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="try the command on the CPU with a small network")
    add_output(parser)
    arguments = parser.parse_args()
    machine = DRY if arguments.dry_run else Machine()
    if machine.provider == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; nothing was measured", file=sys.stderr)
        return 1
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for part in (parity, speed, generation_speed):
            for row in part(Path(name), machine):
                rows.append(row)
                # At once: a machine may be taken away at any time.
                print(f"{row[0]:<44}  {row[1]}", flush=True)
    print(f"\n{machine.name}, {installed_flavours()}")
    if machine.provider == "cuda":
        figures = [{"check": check, "result": result, "device": machine.name} for check, result in rows]
        record("cuda", figures, path=arguments.output)
    return int(any("FAILED" in result for _, result in rows))


if __name__ == "__main__":
    sys.exit(main())

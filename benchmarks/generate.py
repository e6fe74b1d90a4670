"""Time of `generate` at each precision, compared with a loop on the host and with other tools.

    python -m benchmarks.generate --peers FOLDER

85M parameters (hidden 768, 12 layers, 12 heads, 4 kv heads, FFN 2048), vocabulary 32000, prompt 512, 64 new tokens,
CPU. All methods alternate within one run; the figures are medians. FOLDER is prepared by `benchmarks.peers`: other
tools with a Llama of the same sizes, which compute no scores.

The floor of a precision is the time that cannot be avoided: for the prompt, its operations at the measured matrix rate;
for each token, its operations at that rate or the weights' bytes at the measured memory rate, whichever takes longer.
Attention is float32 at every precision.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bonnx
from bonnx.export.artifact import export_model
from bonnx.models.config import LanguageModelConfig, NetworkConfig
from bonnx.models.network import LanguageModel

from .peers import PEERS, start
from .performance import rows
from .rates import MEMORY, fastest, measure_rates, show
from .record import add_output, record
from .timing import interleave

PROMPT, NEW, VOCABULARY, WIDTH, LAYERS = 512, 64, 32000, 768, 12
# What a precision is called in the record, where other tools stand beside it.
NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8", "int4": "int4"}
# Bytes per weight, and the measured rate that bounds its products; a CPU computes with 16-bit weights in float32.
COST = {"fp32": (4.0, "float32"), "fp16": (4.0, "float32"), "bf16": (4.0, "float32")}
COST |= {"int8": (1.0, "int8"), "int4": (0.625, "int8")}


def language_model(layers: int = LAYERS) -> LanguageModel:
    torch.manual_seed(0)
    network = NetworkConfig(
        embed_dim=WIDTH,
        hidden_size=WIDTH,
        num_layers=layers,
        num_heads=12,
        num_kv_heads=4,
        ffn_inner=2048,
        scorer_hidden=256,
        dropout=0.0,
    )
    return LanguageModel(LanguageModelConfig(network=network, vocab_size=VOCABULARY)).eval()


def artifact(folder: Path, precision: str) -> Path:
    """Export the model at a precision, unless an earlier run has."""
    path = folder / precision
    if not path.exists():
        start_time = time.perf_counter()
        options: dict[str, Any] = {"precision": precision, "min_agreement": 0.0}
        export_model(language_model(), path, name="85M", **options)
        print(f"{precision}: exported and verified in {time.perf_counter() - start_time:.0f} s", flush=True)
    return path


def floor(count: int, precision: str, rates: dict[str, float]) -> float:
    """Return the time that no method can avoid, in seconds."""
    size, kind = COST[precision]
    rate, float_rate = fastest(rates, kind), fastest(rates, "float32")
    weights = LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * 256 + 3 * WIDTH * 2048)
    read = 1e-9 * size * (weights + WIDTH * VOCABULARY) / rates[MEMORY]
    attention = 1e-9 * LAYERS * 4 * WIDTH / float_rate
    prompt = 2e-9 * weights * PROMPT / rate + attention * PROMPT * PROMPT / 2
    step = 2e-9 * (weights + WIDTH * VOCABULARY) * count / rate
    return prompt + NEW * (max(step, read) + attention * count * (PROMPT + NEW / 2))


@contextlib.contextmanager
def running(folder: Path | None, names: list[str], threads: int) -> Iterator[dict[str, Any]]:
    """Start the peers with `benchmarks.peers`, and close them when the block ends."""
    peers = start(folder, names, threads) if folder else {}
    try:
        yield peers
    finally:
        for peer in peers.values():
            peer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time `generate` at each precision.")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--precisions", nargs="+", choices=NAMES, default=["fp32", "int8", "int4"])
    parser.add_argument(
        "--peers", type=Path, metavar="FOLDER", help="folder prepared by benchmarks.peers (default: no peers)"
    )
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), help="peers to run (default: all)")
    parser.add_argument("--artifacts", type=Path, help="folder that keeps the exported artifacts for later runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    add_output(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = arguments.artifacts or Path(name)
        models = {
            precision: bonnx.load(artifact(folder, precision), provider="cpu", threads=arguments.threads)
            for precision in arguments.precisions
        }
        rates = measure_rates(arguments.threads)
        print(show(rates), flush=True)
        figures: list[dict[str, Any]] = []
        with running(arguments.peers, arguments.only, arguments.threads) as peers:
            for count in arguments.counts:
                ways = _ways(models, count) | {n: (lambda peer=peer: peer(count)) for n, peer in peers.items()}  # noqa: B023
                repeats = arguments.repeats if count <= 16 else max(2, arguments.repeats // 2)
                seconds = interleave(ways, repeats, pause=0.2)
                measured = _figures(count, seconds, {f"bonnx {NAMES[p]}": floor(count, p, rates) for p in models})
                record("generate", measured, rates=rates, path=arguments.output)
                figures += measured
                print(f"N = {count} done", flush=True)
    print(rows(figures, "n"))


def _figures(count: int, seconds: dict[str, float], floors: dict[str, float]) -> list[dict[str, Any]]:
    """Return what is recorded of each way; of `generate` at a precision also the floor's share of its time."""
    common = {"layers": LAYERS, "prompt": PROMPT, "n": count, "length": NEW}
    figures: list[dict[str, Any]] = [{"way": way, **common, "seconds": value} for way, value in seconds.items()]
    for figure in figures:
        if figure["way"] in floors:
            figure["share_of_floor"] = floors[figure["way"]] / figure["seconds"]
    return figures


def _ways(models: dict[str, Any], count: int) -> dict[str, Callable[[], Any]]:
    """Return `generate` and the host's loop for each model; each call draws a new prompt."""
    rng, options = np.random.default_rng(0), {"n": count, "max_new_tokens": NEW}
    ways: dict[str, Callable[[], Any]] = {}

    def whole(model: Any) -> None:
        model.generate(rng.integers(0, VOCABULARY, PROMPT), **options)

    def steered(model: Any) -> None:
        for _ in model.stream(rng.integers(0, VOCABULARY, PROMPT), **options):
            pass

    for precision, model in models.items():
        ways[f"bonnx {NAMES[precision]}"] = lambda model=model: whole(model)
        ways[f"bonnx {NAMES[precision]}, steered by the host"] = lambda model=model: steered(model)
    return ways


if __name__ == "__main__":
    main()

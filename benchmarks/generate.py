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
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bonnx
from bonnx.export.artifact import export_model
from bonnx.models.config import LanguageModelConfig, NetworkConfig
from bonnx.models.network import LanguageModel

from .peers import PEERS, start
from .rank import interleave, matrix_rates

PROMPT, NEW, VOCABULARY, WIDTH, LAYERS = 512, 64, 32000, 768, 12
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
# Bytes per weight, and the measured rate that bounds its products; a CPU computes with 16-bit weights in float32.
COST = {"fp32": (4.0, "float32"), "fp16": (4.0, "float32"), "bf16": (4.0, "float32")}
COST |= {"int8": (1.0, "int8"), "int4": (0.625, "int8")}


def language_model() -> LanguageModel:
    torch.manual_seed(0)
    network = NetworkConfig(
        embed_dim=WIDTH,
        hidden_size=WIDTH,
        num_layers=LAYERS,
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


def memory_rate(megabytes: int = 400) -> float:
    """Return the rate of reading memory on all threads, in GB/s."""
    values = torch.ones(megabytes * 250_000)
    return megabytes * 1e-3 / interleave({"sum": lambda: values.sum()}, 9)["sum"]


def floor(count: int, precision: str, rates: dict[str, float], gigabytes: float) -> float:
    """Return the time that no method can avoid, in seconds."""
    size, kind = COST[precision]
    rate, float_rate = (max(r for way, r in rates.items() if way.endswith(k)) for k in (kind, "float32"))
    weights = LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * 256 + 3 * WIDTH * 2048)
    read = 1e-9 * size * (weights + WIDTH * VOCABULARY) / gigabytes
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
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32", "int8", "int4"])
    parser.add_argument(
        "--peers", type=Path, metavar="FOLDER", help="folder prepared by benchmarks.peers (default: no peers)"
    )
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), help="peers to run (default: all)")
    parser.add_argument("--artifacts", type=Path, help="folder that keeps the exported artifacts for later runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = arguments.artifacts or Path(name)
        models = {
            precision: bonnx.load(artifact(folder, precision), provider="cpu", threads=arguments.threads)
            for precision in arguments.precisions
        }
        rates, memory = matrix_rates(Path(name), arguments.threads), memory_rate()
        print("  ".join(f"{way} {rate:.0f} GFLOP/s" for way, rate in rates.items()), f" memory {memory:.1f} GB/s")
        result: dict[str, Any] = {"rates": rates, "memory": memory, "seconds": {}, "floors": {}}
        with running(arguments.peers, arguments.only, arguments.threads) as peers:
            for count in arguments.counts:
                ways = _ways(models, count) | {n: (lambda peer=peer: peer(count)) for n, peer in peers.items()}  # noqa: B023
                repeats = arguments.repeats if count <= 16 else max(2, arguments.repeats // 2)
                result["seconds"][count] = interleave(ways, repeats, pause=0.2)
                result["floors"][count] = {p: floor(count, p, rates, memory) for p in models}
                print(f"N = {count} done", flush=True)
    print(table(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


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
        ways[f"generate {precision}"] = lambda model=model: whole(model)
        ways[f"generate {precision}, steered by the host"] = lambda model=model: steered(model)
    return ways


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table: seconds of each method by N, and the floor's share of them."""
    counts = list(result["seconds"])

    def row(name: str, cells: Iterable[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    lines = [row("seconds", (f"N = {n}" for n in counts)), f"|---|{'---|' * len(counts)}"]
    for way in result["seconds"][counts[0]]:
        taken = [result["seconds"][n][way] for n in counts]
        lines.append(row(way, (f"{seconds:.3f}" for seconds in taken)))
    for precision in result["floors"][counts[0]]:
        shares = [result["floors"][n][precision] / result["seconds"][n][f"generate {precision}"] for n in counts]
        lines.append(row(f"floor of {precision} / generate", (f"{100 * share:.0f}%" for share in shares)))
    return "\n".join(lines)


if __name__ == "__main__":
    main()

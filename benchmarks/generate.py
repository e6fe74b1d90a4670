"""Time of `generate` against the same loop steered by the host, and transformers: `python -m benchmarks.generate`.

85M parameters (hidden 768, 12 layers, 12 heads, 4 kv heads, FFN 2048), vocabulary 32000, prompt 512, 64 new tokens,
CPU, float32. All ways take turns in one run; medians. transformers, if it is installed, runs a Llama of the same sizes,
which scores nothing. The floor is what cannot be avoided: for the prompt its operations at the measured matrix rate;
for each step its operations at that rate or the weights' bytes at the measured memory rate, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bonnx
from bonnx.export.artifact import export_model
from bonnx.models.config import LanguageModelConfig, NetworkConfig
from bonnx.models.network import LanguageModel
from bonnx.runtime.steps import grow

from .rank import interleave, matrix_rates

PROMPT, NEW, VOCABULARY, WIDTH, LAYERS = 512, 64, 32000, 768, 12


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


def transformers_way(prompt: Any, count: int) -> Callable[[], Any] | None:
    try:
        import transformers
    except ImportError:
        return None
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2048,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.from_numpy(prompt)[None]
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    return lambda: model.generate(ids, attention_mask=mask, num_return_sequences=count, **options)


def memory_rate(megabytes: int = 400) -> float:
    """GB/s of reading memory on all threads."""
    values = torch.ones(megabytes * 250_000)
    return megabytes * 1e-3 / interleave({"sum": lambda: values.sum()}, 9)["sum"]


def floor(count: int, gflops: float, gigabytes: float) -> float:
    """Seconds that no way avoids."""
    weights = LAYERS * (2 * WIDTH * WIDTH + 2 * WIDTH * 256 + 3 * WIDTH * 2048)
    prompt = 2 * weights * PROMPT + LAYERS * 4 * WIDTH * PROMPT * PROMPT / 2
    step = 2 * (weights + WIDTH * VOCABULARY) * count + LAYERS * 4 * WIDTH * count * (PROMPT + NEW / 2)
    read = 4e-9 * (weights + WIDTH * VOCABULARY)
    return 1e-9 * prompt / gflops + NEW * max(1e-9 * step / gflops, read / gigabytes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        start = time.perf_counter()
        export_model(language_model(), folder / "artifact", name="85M")
        print(f"exported and verified in {time.perf_counter() - start:.0f} s")
        model = bonnx.load(folder / "artifact", provider="cpu", threads=arguments.threads)
        rates = matrix_rates(folder, arguments.threads)
    limit, memory = max(rate for way, rate in rates.items() if way.endswith("float32")), memory_rate()
    print(f"float32 matrix rate {limit:.0f} GFLOP/s, memory {memory:.1f} GB/s", flush=True)
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, PROMPT)
    result: dict[str, Any] = {"rates": rates, "memory": memory, "seconds": {}}
    for count in arguments.counts:
        options: dict[str, Any] = {"n": count, "max_new_tokens": NEW}
        request, ids = model._request(prompt, options)
        ways: dict[str, Callable[[], Any]] = {
            "generate": lambda: model.generate(prompt, **options),  # noqa: B023 - used within this turn only
            "steered by the host": lambda: list(grow(model.session, ids, request, None, None)),  # noqa: B023
        }
        theirs = transformers_way(prompt, count)
        if theirs is not None:
            ways["transformers"] = theirs
        seconds = interleave(ways, arguments.repeats if count <= 16 else max(2, arguments.repeats // 2))
        least = floor(count, limit, memory)
        print(f"\nN = {count}: floor {least:.3f} s, {100 * least / seconds['generate']:.0f}% of generate")
        for way, value in seconds.items():
            print(f"  {way:<22} {value:8.3f} s   {value / seconds['generate']:6.2f}", flush=True)
        result["seconds"][count] = seconds | {"floor": least}
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Time and memory of `rank`, compared with other methods: `python -m benchmarks.rank`.

85M parameters (hidden 768, 12 layers, 12 heads, 4 kv heads, FFN 2048), prompt 512, 64 tokens per candidate, CPU. All
methods alternate within one run, so that slow phases of the machine affect all of them; the figures are medians.
Outputs are compared first.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bonnx
from bonnx.export.artifact import export_model
from bonnx.export.graphs.selection import plain_selection
from bonnx.export.graphs.trace import trace_graphs
from bonnx.models import build
from bonnx.models.network import TwoHeadedNetwork
from bonnx.models.rotary import rotate
from bonnx.runtime.artifact.manifest import Scoring

from .rates import fastest, has_bfloat16, measure_rates, session, show, without_bfloat16
from .record import add_output, record
from .timing import interleave

PROMPT, LENGTH, WIDTH = 512, 64, 768
OURS, OURS8 = "bonnx float32", "bonnx int8"


def network(layers: int = 12) -> TwoHeadedNetwork:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_layers": layers, "num_heads": 12, "num_kv_heads": 4, "ffn_inner": 2048}
    return build(embed_dim=WIDTH, scorer_hidden=256, dropout=0.0, **sizes).eval()


class SharedByHand(nn.Module):
    """A careful implementation in PyTorch: the prompt is computed once, its cache expanded to the candidates."""

    def __init__(self, net: TwoHeadedNetwork) -> None:
        super().__init__()
        self.net = net

    def forward(self, prompt: Tensor, candidates: Tensor) -> Tensor:
        """Prompt (1, P, E), candidates (N, C, E) -> scores (N, C)."""
        net, count, length, size = self.net, *candidates.shape[:2], prompt.shape[1]
        index = torch.arange(size + length, device=prompt.device)
        (rotation, *_) = net.rotations(index[None])
        assert rotation is not None
        cos, sin = (t.to(prompt.dtype) for t in rotation)
        mask = index <= index[size:, None]
        x, y = net.input_projection(prompt), net.input_projection(candidates)
        for block in net.layers():
            attention = block.attention
            joined = block.attention_norm(torch.cat([x.flatten(0, 1), y.flatten(0, 1)]))[None]
            q, k, v = (
                projection(joined).unflatten(-1, (-1, attention.config.size_of_head))
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            first = [t[:, :size].transpose(1, 2) for t in (q, k, v)]
            rest = [t[0, size:].unflatten(0, (count, length)).transpose(1, 2) for t in (q, k, v)]
            first[:2] = [rotate(t, cos[:, :, :size], sin[:, :, :size]) for t in first[:2]]
            rest[:2] = [rotate(t, cos[:, :, size:], sin[:, :, size:]) for t in rest[:2]]
            a = F.scaled_dot_product_attention(*first, is_causal=True, enable_gqa=True)
            keys, values = (
                torch.cat([p.expand(count, -1, -1, -1), o], 2) for p, o in zip(first[1:], rest[1:], strict=True)
            )
            b = F.scaled_dot_product_attention(rest[0], keys, values, attn_mask=mask, enable_gqa=True)
            both = torch.cat([a.transpose(1, 2).flatten(2)[0], b.transpose(1, 2).flatten(2).flatten(0, 1)])
            h = torch.cat([x.flatten(0, 1), y.flatten(0, 1)]) + attention.out_proj(both)
            h = h + block.ffn(block.ffn_norm(h))
            x, y = h[None, :size], h[size:].unflatten(0, (count, length))
        scores: Tensor = net.scorer(net.final_norm(y))[..., 0]
        return scores


def plain_session(net: TwoHeadedNetwork, folder: Path, threads: int) -> Any:
    """Export the network with plain `torch.onnx.export`, for whole rows."""
    path = folder / "plain.onnx"
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net, (torch.randn(3, 5, WIDTH),), dynamic_shapes=shapes, input_names=["x"], dynamo=True, verbose=False
        )
    program.save(str(path))
    return session(path, threads)


def work(layers: int, count: int) -> float:
    """Return the GFLOP that `rank` cannot avoid: all products of all tokens, and attention to unmasked positions."""
    kv, inner = 256, 2048
    linear = 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * kv + 3 * WIDTH * inner)
    tokens = PROMPT + count * LENGTH
    read = PROMPT * (PROMPT + 1) / 2 + count * LENGTH * (PROMPT + (LENGTH + 1) / 2)
    return 1e-9 * layers * (linear * tokens + 4 * WIDTH * read)


def peak_memory(path: Path, count: int) -> float:
    """Return the MB that one call of `rank` adds after the graph is loaded, measured in a separate process."""
    command = [sys.executable, "-m", "benchmarks.rank", "--memory-of", str(path), "--counts", str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(path: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    model = bonnx.load(path, provider="cpu", threads=2)
    prompt, candidates = draw(rng, count)
    model.rank(prompt[:2], [c[:2] for c in candidates[:1]])
    # Loading has a higher peak than a short call, so the peak is reset first (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    model.rank(prompt, candidates)
    print((_memory("VmHWM") - before) / 1024)


def _memory(name: str) -> int:
    """Read a memory value of this process from its status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def draw(rng: np.random.Generator, count: int) -> tuple[Any, list[Any]]:
    prompt = rng.standard_normal((PROMPT, WIDTH), np.float32)
    return prompt, list(rng.standard_normal((count, LENGTH, WIDTH), np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--opset-18", action="store_true", help="also time the graph with decomposed operators")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--artifacts", type=Path, help="folder that keeps the exported artifacts for later runs")
    add_output(parser)
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_memory(arguments.memory_of, arguments.counts[0])
        return
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        compare(Path(name), arguments)


@dataclass(frozen=True)
class Models:
    """What is compared: the artifacts, the graph of opset 18 if asked for, and the network as others run it."""

    float32: bonnx.Model
    int8: bonnx.Model
    opset_18: Any
    net: TwoHeadedNetwork
    plain: Any


def artifact(arguments: argparse.Namespace, folder: Path, precision: str) -> Path:
    return (arguments.artifacts or folder) / f"rank-{arguments.layers}-{precision}"


def make(folder: Path, arguments: argparse.Namespace) -> Models:
    net = network(arguments.layers)
    for precision in ("fp32", "int8"):
        if not (path := artifact(arguments, folder, precision)).exists():
            options: dict[str, Any] = {"precision": precision, "min_agreement": 0.0}
            export_model(net, path, name="85M", **options)
    paths = (artifact(arguments, folder, precision) for precision in ("fp32", "int8"))
    artifacts = (bonnx.load(path, provider="cpu", threads=arguments.threads) for path in paths)
    decomposed = None
    if arguments.opset_18:
        ir.save(dict(trace_graphs(net, Scoring(), opset=18))["rank"], folder / "18.onnx")
        decomposed = session(folder / "18.onnx", arguments.threads)
    return Models(*artifacts, decomposed, net, plain_session(net, folder, arguments.threads))


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    models = make(folder, arguments)
    rates, rng = measure_rates(arguments.threads), np.random.default_rng(1)
    print(show(rates), flush=True)
    if not has_bfloat16():
        without_bfloat16("PyTorch by hand in bfloat16")
    for count in arguments.counts:
        ways = compared_ways(models, *draw(rng, count))
        seconds = interleave(ways, arguments.repeats if count <= 16 else max(2, arguments.repeats // 2), pause=0.2)
        common = {"layers": arguments.layers, "prompt": PROMPT, "n": count, "length": LENGTH}
        figures = {way: {"way": way, **common, "seconds": value} for way, value in seconds.items()}
        for way, kind in ((OURS, "float32"), (OURS8, "int8")):
            figures[way]["share_of_rate"] = work(arguments.layers, count) / seconds[way] / fastest(rates, kind)
        figures[OURS]["megabytes"] = peak_memory(artifact(arguments, folder, "fp32"), count)
        print(f"\nN = {count}: {figures[OURS]['megabytes']:.0f} MB for the call")
        for way, figure in figures.items():
            share = f"   {100 * figure['share_of_rate']:.0f}% of the matrix rate" if "share_of_rate" in figure else ""
            print(f"  {way:<40} {seconds[way]:8.3f} s   {seconds[way] / seconds[OURS]:6.2f}{share}", flush=True)
        record("rank", figures.values(), rates=rates, path=arguments.output)


def compared_ways(models: Models, prompt: Any, candidates: list[Any]) -> dict[str, Callable[[], Any]]:
    """Return all ways of computing the same scores, after comparing those of float32."""
    count, by_hand = len(candidates), SharedByHand(models.net)
    p, c = torch.from_numpy(prompt)[None], torch.from_numpy(np.stack(candidates))
    rows = torch.cat([p.expand(count, -1, -1), c], 1).contiguous()
    feeds = {"x": rows.numpy()}
    expected = models.net(rows)[1][:, PROMPT:, 0].numpy()
    for scores in (np.stack(models.float32.rank(prompt, candidates).scores), by_hand(p, c).numpy()):
        assert np.abs(scores - expected).max() < 1e-4
    ways: dict[str, Callable[[], Any]] = {
        OURS: lambda: models.float32.rank(prompt, candidates),
        OURS8: lambda: models.int8.rank(prompt, candidates),
        "PyTorch float32, whole rows": lambda: models.net(rows)[1],
        "plain ONNX export float32, whole rows": lambda: models.plain.run(None, feeds),
        "PyTorch float32 by hand, prompt once": lambda: by_hand(p, c),
    }
    if has_bfloat16():
        by_hand16, p16, c16 = SharedByHand(copy.deepcopy(models.net).bfloat16()), p.bfloat16(), c.bfloat16()
        ways["PyTorch bfloat16 by hand, prompt once"] = lambda: by_hand16(p16, c16)
    if models.opset_18 is not None:
        masks = {
            "prompt_mask": np.ones((1, PROMPT), np.int64),
            "candidate_mask": np.ones((count, 1, LENGTH), np.int64),
        }
        feeds18 = {"prompt_embeds": prompt[None], "candidate_embeds": np.stack(candidates)[:, None], **masks}
        feeds18 |= plain_selection()
        ways["bonnx float32, opset 18"] = lambda: models.opset_18.run(None, feeds18)
    return ways


if __name__ == "__main__":
    main()

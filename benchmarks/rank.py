"""Time and memory of `rank`, compared with other methods: `python -m benchmarks.rank`.

85M parameters (hidden 768, 12 layers, 12 heads, 4 kv heads, FFN 2048), prompt 512, 64 tokens per candidate, CPU. All
methods alternate within one run, so that slow phases of the machine affect all of them; the figures are medians.
Outputs are compared first.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
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

PROMPT, LENGTH, WIDTH = 512, 64, 768


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
        (rotation, *_) = net.rotations(torch.arange(size + length)[None])
        assert rotation is not None
        cos, sin = (t.to(prompt.dtype) for t in rotation)
        mask = torch.arange(size + length)[None] <= torch.arange(length)[:, None] + size
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


def session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def interleave(ways: dict[str, Callable[[], Any]], repeats: int, pause: float = 0.0) -> dict[str, float]:
    """Return the median seconds of each method, alternating between them.

    A method that returns a float has measured its own time. The pause lets the threads of one library, which spin for a
    while after a call, fall asleep before the next call.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            time.sleep(pause)
            start = time.perf_counter()
            result = way()
            if repeat:
                taken[name].append(result if isinstance(result, float) else time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in taken.items()}


def matrix_rates(folder: Path, threads: int, repeats: int = 9) -> dict[str, float]:
    """Return the GFLOP/s of a matrix product of typical shape, (1536, 768) by (768, 2048)."""
    a, b = torch.randn(1536, WIDTH), torch.randn(WIDTH, 2048)
    a16, b16, feeds = a.bfloat16(), b.bfloat16(), {"a": a.numpy()}
    product, product8 = _product_session(folder, b, threads), _product_session(folder, b, threads, integer=True)
    ways = {
        "PyTorch float32": lambda: a @ b,
        "PyTorch bfloat16": lambda: a16 @ b16,
        "ONNX Runtime float32": lambda: product.run(None, feeds),
        "ONNX Runtime int8": lambda: product8.run(None, feeds),
    }
    # Measured in blocks with pauses, because one library's threads spin for a while after a call and slow the other.
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(5):
        for way_name, way in ways.items():
            time.sleep(0.2)
            best[way_name] = min(best[way_name], *(interleave({way_name: way}, repeats).values()))
    return {name: 2e-9 * 1536 * WIDTH * 2048 / seconds for name, seconds in best.items()}


def _product_session(folder: Path, b: Tensor, threads: int, *, integer: bool = False) -> Any:
    """Make a session with one matrix product; the integer one has a single input scale, which is fastest."""
    info, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    weights, nodes = {"b": b.numpy()}, [node("MatMul", ["a", "b"], ["c"])]
    if integer:
        scale = b.abs().amax(0) / 127
        weights = {"b": (b / scale).round().to(torch.int8).numpy(), "scale": scale.numpy()}
        nodes = [
            node("DynamicQuantizeLinear", ["a"], ["q", "step", "zero"]),
            node("MatMulInteger", ["q", "b", "zero"], ["i"]),
            node("Cast", ["i"], ["f"], to=onnx.TensorProto.FLOAT),
            node("Mul", ["step", "scale"], ["s"]),
            node("Mul", ["f", "s"], ["c"]),
        ]
    graph = onnx.helper.make_graph(
        nodes,
        "product",
        [info("a", 1, ["m", WIDTH])],
        [info("c", 1, ["m", 2048])],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)])
    onnx.save(model, folder / "product.onnx")
    return session(folder / "product.onnx", threads)


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
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_memory(arguments.memory_of, arguments.counts[0])
        return
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        result = compare(Path(name), arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def compare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    net = network(arguments.layers)
    export_model(net, folder / "artifact", name="85M")
    export_model(net, folder / "int8", name="85M", precision="int8", min_agreement=0.0)
    model, model8 = (
        bonnx.load(folder / name, provider="cpu", threads=arguments.threads) for name in ("artifact", "int8")
    )
    plain = plain_session(net, folder, arguments.threads)
    by_hand, by_hand16 = SharedByHand(net), SharedByHand(copy.deepcopy(net).bfloat16())
    rng = np.random.default_rng(1)
    decomposed = None
    if arguments.opset_18:
        ir.save(dict(trace_graphs(net, Scoring(), opset=18))["rank"], folder / "18.onnx")
        decomposed = session(folder / "18.onnx", arguments.threads)
    rates = matrix_rates(folder, arguments.threads)
    limit = max(rate for name, rate in rates.items() if name.endswith("float32"))
    print("  ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in rates.items()), flush=True)
    result: dict[str, Any] = {"rates": rates, "seconds": {}, "megabytes": {}}
    for count in arguments.counts:
        prompt, candidates = draw(rng, count)
        p, c = torch.from_numpy(prompt)[None], torch.from_numpy(np.stack(candidates))
        rows = torch.cat([p.expand(count, -1, -1), c], 1).contiguous()
        p16, c16, feeds = p.bfloat16(), c.bfloat16(), {"x": rows.numpy()}
        ways: dict[str, Callable[[], Any]] = {
            "rank": lambda: model.rank(prompt, candidates),  # noqa: B023 - used within this iteration only
            "rank, int8": lambda: model8.rank(prompt, candidates),  # noqa: B023
            "PyTorch eager, whole rows": lambda: net(rows)[1],  # noqa: B023
            "plain export, whole rows": lambda: plain.run(None, feeds),  # noqa: B023
            "PyTorch by hand, prompt once": lambda: by_hand(p, c),  # noqa: B023
            "PyTorch by hand, prompt once, bfloat16": lambda: by_hand16(p16, c16),  # noqa: B023
        }
        if decomposed is not None:
            masks = {
                "prompt_mask": np.ones((1, PROMPT), np.int64),
                "candidate_mask": np.ones((count, 1, LENGTH), np.int64),
            }
            feeds18 = {"prompt_embeds": prompt[None], "candidate_embeds": np.stack(candidates)[:, None], **masks}
            feeds18 |= plain_selection()
            ways["rank, opset 18"] = lambda: decomposed.run(None, feeds18)  # noqa: B023
        expected = net(rows)[1][:, PROMPT:, 0].numpy()
        for scores in (np.stack(model.rank(prompt, candidates).scores), by_hand(p, c).numpy()):
            assert np.abs(scores - expected).max() < 1e-4
        seconds = interleave(ways, arguments.repeats if count <= 16 else max(2, arguments.repeats // 2), pause=0.2)
        share = work(arguments.layers, count) / seconds["rank"] / limit
        share8 = work(arguments.layers, count) / seconds["rank, int8"] / rates["ONNX Runtime int8"]
        memory = peak_memory(folder / "artifact", count)
        print(f"\nN = {count}: {100 * share:.0f}% of the float32 matrix rate, {memory:.0f} MB for the call")
        print(f"  int8: {100 * share8:.0f}% of the int8 matrix rate")
        for way, value in seconds.items():
            print(f"  {way:<40} {value:8.3f} s   {value / seconds['rank']:6.2f}", flush=True)
        result["seconds"][count] = seconds | {"share of matrix rate": share, "int8 share": share8}
        result["megabytes"][count] = memory
    return result


if __name__ == "__main__":
    main()

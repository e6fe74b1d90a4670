"""Causal self-attention of one long prompt by itself: the graphs' blocks beside ONNX Runtime's own kernels and PyTorch.

    python -m benchmarks.attention

9 query heads over 3 kv heads of 64 features (SmolLM2-135M), float32. Each way has a process of its own, they take
turns, and the figures are medians; memory is the peak above that before the first run, inputs excluded. Outputs are
compared first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bonnx.export.graphs.blocks import attention_functions
from bonnx.export.graphs.builder import DOMAIN, Builder, finish
from bonnx.models.config import NetworkConfig

from .long import resident
from .performance import rows
from .rates import measure_rates
from .record import add_output, record

HEADS, KV_HEADS, SIZE = 9, 3, 64
BLOCKS, CONTRIB, STANDARD, TORCH = "blocks (bonnx)", "GroupQueryAttention", "Attention, opset 24", "PyTorch sdpa"
Array = NDArray[np.float32]


def arrays(length: int) -> tuple[Array, Array, Array]:
    """Random queries (1, H, T, K), keys and values (1, G, T, K)."""
    rng = np.random.default_rng(length)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (rng.standard_normal((1, n, length, SIZE), np.float32) for n in heads)
    return q, k, v


def graph(way: str) -> ir.Model:
    """A graph that computes attention: from q, k and v, or for the blocks from what their function takes."""
    b = Builder("attention")
    if way == BLOCKS:
        names = ("q", "keys", "values", "positions", "new_positions")
        inputs = [ir.val(name, ir.DataType.INT64 if "positions" in name else ir.DataType.FLOAT) for name in names]
        out = b.attend_rows(*inputs, _domain=DOMAIN)
    elif way == STANDARD:
        inputs = [ir.val(name, ir.DataType.FLOAT) for name in "qkv"]
        out = b.Attention(*inputs, is_causal=1)
    else:
        # (1, T, heads * K), and the length as the operator wants it.
        inputs = [ir.val(name, ir.DataType.FLOAT) for name in "qkv"]
        total = b.Cast(b.Shape(inputs[0], start=1, end=2), to=ir.DataType.INT32)
        last = b.Sub(total, b.constant(np.array([1], np.int32)))
        out, *_ = b.GroupQueryAttention(
            *inputs,
            None,
            None,
            last,
            b.Squeeze(total),
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            _domain="com.microsoft",
            _outputs=3,
        )
    out.name, out.dtype = "out", ir.DataType.FLOAT
    whole = ir.Graph(inputs, [out], nodes=b.nodes, initializers=b.initializers, name="attention")
    config = NetworkConfig(embed_dim=1, hidden_size=HEADS * SIZE, num_heads=HEADS, num_kv_heads=KV_HEADS)
    return finish(whole, attention_functions(config), 24 if way == STANDARD else 23)


def feeds(way: str, length: int) -> dict[str, Any]:
    """The inputs of a graph, as the graphs around it would pass them."""
    q, k, v = arrays(length)
    if way == STANDARD:
        return {"q": q, "k": k, "v": v}
    if way == CONTRIB:
        return {name: x.transpose(0, 2, 1, 3).reshape(1, length, -1) for name, x in zip("qkv", (q, k, v), strict=True)}
    group = HEADS // KV_HEADS
    scaled = q.reshape(1, KV_HEADS, group, length, SIZE).transpose(0, 1, 3, 2, 4) * np.float32(SIZE**-0.5)
    # The extra features and the extra key of `shared_keys`, without padding.
    keys = np.zeros((1, KV_HEADS, SIZE + 2, length + 1), np.float32)
    keys[:, :, :SIZE, 1:], keys[:, :, -1, 0] = k.transpose(0, 1, 3, 2), 1
    values = np.concatenate([np.zeros_like(v[:, :, :1]), v], 2)
    positions = np.arange(length)[None]
    scaled = np.ascontiguousarray(scaled).reshape(1, KV_HEADS, length * group, SIZE)
    return {"q": scaled, "keys": keys, "values": values, "positions": positions, "new_positions": positions}


def in_order(way: str, out: Array, length: int) -> Array:
    """An output as (H, T, K)."""
    if way == BLOCKS:
        return out.reshape(KV_HEADS, length, -1, SIZE).transpose(0, 2, 1, 3).reshape(HEADS, length, SIZE)
    if way == CONTRIB:
        return out.reshape(length, HEADS, SIZE).transpose(1, 0, 2)
    return out[0]


def runner(way: str, length: int, threads: int) -> Callable[[], Array]:
    if way == TORCH:
        import torch

        torch.set_num_threads(threads)
        q, k, v = map(torch.from_numpy, arrays(length))
        attention = torch.nn.functional.scaled_dot_product_attention
        return lambda: attention(q, k, v, is_causal=True, enable_gqa=True).numpy()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    model = ir.to_proto(graph(way)).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = feeds(way, length)
    return lambda: session.run(["out"], given)[0]


def serve(way: str, threads: int) -> None:
    """Answer lengths on stdin with seconds, megabytes, and some of the output."""
    for line in sys.stdin:
        length = int(line)
        run = runner(way, length, threads)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        start = time.perf_counter()
        out = run()
        seconds = time.perf_counter() - start
        some = in_order(way, out, length)[:, :: max(1, length // 50)]
        print(json.dumps([seconds, (resident("VmHWM") - before) / 1000, some.ravel()[:4000].tolist()]), flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 4096, 8000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    add_output(parser)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.threads)
        return
    rates = measure_rates(os.cpu_count() or 1)
    command = [sys.executable, "-m", "benchmarks.attention", "--threads", str(arguments.threads), "--serve"]
    children = {
        way: subprocess.Popen([*command, way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for way in (BLOCKS, CONTRIB, STANDARD, TORCH)
    }

    def ask(way: str, length: int) -> list[Any]:
        stdin, stdout = children[way].stdin, children[way].stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{length}\n")
        stdin.flush()
        answer: list[Any] = json.loads(stdout.readline())
        return answer

    figures: list[dict[str, Any]] = []
    for length in arguments.lengths:
        found: dict[str, list[list[Any]]] = {way: [] for way in children}
        for _ in range(arguments.repeats + 1):
            for way, answers in found.items():
                answers.append(ask(way, length))
        expected = np.array(found[TORCH][0][2])
        for way, answers in found.items():
            worst = np.abs(np.array(answers[0][2]) - expected).max()
            if not worst < 1e-4:
                raise SystemExit(f"{way}: differs from PyTorch by {worst}")
            seconds, megabytes = np.median([answer[:2] for answer in answers[1:]], axis=0)
            figures.append({"way": way, "prompt": length, "seconds": seconds, "megabytes": megabytes})
        record("attention", figures[-len(children) :], rates=rates, path=arguments.output)
    for child in children.values():
        child.communicate()
    print(rows(figures, "prompt"))


if __name__ == "__main__":
    main()

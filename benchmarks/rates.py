"""What the machine can do at most: the rates of matrix products and of memory, and the bfloat16 that it computes with.

A benchmark measures them in its own run, so that its figures can be read as a share of what is possible.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

from .timing import interleave

# A product of typical shape: (ROWS, INNER) by (INNER, COLUMNS).
ROWS, INNER, COLUMNS = 1536, 768, 2048
MEMORY = "memory"


def has_bfloat16() -> bool:
    """Whether PyTorch has kernels for bfloat16 products on this processor; without, one takes minutes.

    oneDNN's need AVX-512 at least, as PyTorch itself decides by the processor's flags.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def without_bfloat16(ways: str) -> None:
    """Say that ways of computing are left out on this processor."""
    print(f"left out {ways}: PyTorch has no kernel for bfloat16 products on this processor", flush=True)


def measure_rates(threads: int) -> dict[str, float]:
    """Measure the rates of matrix products, in GFLOP/s, and under `MEMORY` that of reading, in GB/s.

    The names of the products begin with the library and end with `float32`, `bfloat16` or `int8`. What the processor
    has no kernel for is left out.
    """
    a, b = torch.randn(ROWS, INNER), torch.randn(INNER, COLUMNS)
    a16, b16, feeds = a.bfloat16(), b.bfloat16(), {"a": a.numpy()}
    with tempfile.TemporaryDirectory() as name:
        product, product8 = (_product_session(Path(name), b, threads, integer=integer) for integer in (False, True))
    ways = {
        "PyTorch float32": lambda: a @ b,
        "PyTorch bfloat16": lambda: a16 @ b16,
        "ONNX Runtime float32": lambda: product.run(None, feeds),
        "ONNX Runtime int8": lambda: product8.run(None, feeds),
    }
    if not has_bfloat16():
        without_bfloat16("the rate of PyTorch bfloat16")
        del ways["PyTorch bfloat16"]
    # Measured in blocks with pauses, because one library's threads spin for a while after a call and slow the other.
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(5):
        for way_name, way in ways.items():
            time.sleep(0.2)
            best[way_name] = min(best[way_name], *(interleave({way_name: way}, 9).values()))
    return {name: 2e-9 * ROWS * INNER * COLUMNS / seconds for name, seconds in best.items()} | {MEMORY: _memory_rate()}


def fastest(rates: dict[str, float], kind: str) -> float:
    """Return the highest rate of any library for `float32`, `bfloat16` or `int8`, in GFLOP/s."""
    return max(rate for name, rate in rates.items() if name.endswith(kind))


def show(rates: dict[str, float]) -> str:
    """Return the rates in one line."""
    products = (f"{name} {rate:.0f} GFLOP/s" for name, rate in rates.items() if name != MEMORY)
    return "  ".join([*products, f"memory {rates[MEMORY]:.1f} GB/s"])


def session(path: Path, threads: int) -> Any:
    """Return ONNX Runtime's session of a graph on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _memory_rate(megabytes: int = 400) -> float:
    """Return the rate of reading memory on all of PyTorch's threads, in GB/s."""
    values = torch.ones(megabytes * 250_000)
    return megabytes * 1e-3 / interleave({"sum": lambda: values.sum()}, 9)["sum"]


def _product_session(folder: Path, b: Tensor, threads: int, *, integer: bool) -> Any:
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
        [info("a", 1, ["m", INNER])],
        [info("c", 1, ["m", COLUMNS])],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 18)])
    onnx.save(model, folder / "product.onnx")
    return session(folder / "product.onnx", threads)

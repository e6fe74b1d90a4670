"""Where the graphs' nodes run on CUDA, without a GPU: `python -m benchmarks.placement [GRAPH.onnx ...]`.

Without files, it traces a small language model with a scorer at every precision. The counts are for the version of
ONNX Runtime that `kernels.json` is from. `bonnx doctor ARTIFACT` gives those of the installed one.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import onnx
import onnx_ir as ir
import torch

from bonnx.export.graphs.trace import trace_graphs
from bonnx.export.precision.quantize import quantized
from bonnx.models.config import LanguageModelConfig, NetworkConfig
from bonnx.models.network import LanguageModel
from bonnx.runtime.artifact.manifest import Precision, Scoring
from bonnx.runtime.engine.placement import CPU_ONLY

from .kernels import read_kernels
from .static import Part, place

SIZES = {"embed_dim": 64, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "scorer_hidden": 32}


def graphs(precision: Precision, opset: int, **options: Any) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Trace every graph that runs on CUDA, of a small language model with a scorer; options are the network's."""
    torch.manual_seed(0)
    config = LanguageModelConfig(network=NetworkConfig(**SIZES, **options), vocab_size=300)  # type: ignore[arg-type]
    model = quantized(LanguageModel(config).eval(), precision)
    static = precision not in ("int8", "int4")
    for name, graph in trace_graphs(model, Scoring(), opset=opset, static=static):
        if name not in CPU_ONLY:
            yield name, ir.to_proto(graph)


def described(name: str, parts: Sequence[Part]) -> str:
    """A line of the table: the graph and its bodies together, and the copies of each."""
    graph, *bodies = parts
    without = sum((part.without for part in parts), Counter[str]())
    lacking = ", ".join(f"{count} {operator}" for operator, count in sorted(without.items())) or "none"
    cuda, host = sum(part.cuda for part in parts), sum(part.host for part in parts)
    inside = sum(part.copies + part.border for part in bodies)
    return f"{name:<26} {cuda:>5} {host:>7} {graph.copies:>8} {inside:>10}   {lacking}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="*")
    version, kernels = read_kernels()
    print(f"onnxruntime-gpu {version}")
    print(f"{'graph':<26} {'CUDA':>5} {'shapes':>7} {'copies':>8} {'in bodies':>10}   no kernel")
    files = parser.parse_args().files
    for path in files:
        print(described(path.name, place(onnx.load(path, load_external_data=False), kernels)))
    for precision, opset in [] if files else [*((p, 23) for p in get_args(Precision)), ("fp32", 18)]:
        for name, model in graphs(precision, opset):
            print(described(f"{name}, {precision}, opset {opset}", place(model, kernels)), flush=True)


if __name__ == "__main__":
    sys.exit(main())

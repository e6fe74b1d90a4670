"""Write graphs as files that share one weights file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bonnx.runtime.artifact.folder import WEIGHTS
from bonnx.runtime.artifact.manifest import Graph, Value

__all__ = ["write_graphs"]

# Smaller tensors stay in the graph, so that a program that only reads shapes needs no second file. Alignment in bytes.
_EXTERNAL_FROM, _ALIGNMENT = 1024, 64


def write_graphs(models: Iterable[tuple[str, ir.Model]], folder: Path, suffix: str) -> dict[str, Graph]:
    """Write every graph as `onnx/NAME{suffix}.onnx`; equal tensors are stored once.

    Args:
        models: names and graphs; each graph is freed before the next one is made.
        folder: the artifact's folder.
        suffix: denotes the precision in file names.

    Returns:
        The manifest's entry for each graph, by name.
    """
    (folder / "onnx").mkdir()
    graphs, places = {}, dict[str, tuple[int, int]]()
    with (folder / "onnx" / WEIGHTS).open("wb") as weights:
        for name, model in models:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                assert tensor is not None
                if tensor.nbytes < _EXTERNAL_FROM:
                    continue
                array = tensor.numpy()
                shape = ir.Shape(array.shape)
                # Views the bytes without a copy if they are contiguous.
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                digest = hashlib.sha256(data).hexdigest()
                if digest not in places:
                    weights.write(b"\0" * (-weights.tell() % _ALIGNMENT))
                    places[digest] = (weights.tell(), len(data))
                    weights.write(data)
                offset, length = places[digest]
                value.const_value = ir.ExternalTensor(
                    WEIGHTS, offset, length, tensor.dtype, shape=shape, name=str(value.name)
                )
            file = f"onnx/{name}{suffix}.onnx"
            (folder / file).write_bytes(ir.to_proto(model).SerializeToString())
            inputs, outputs = ([_value(v) for v in values] for values in (model.graph.inputs, model.graph.outputs))
            opset = model.graph.opset_imports[""]
            graphs[name] = Graph(file=file, opset=opset, inputs=inputs, outputs=outputs)
            # Free the graph before the next one is traced.
            del model
    return graphs


def _value(value: ir.Value) -> Value:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = [axis if isinstance(axis, int) else str(axis.value) for axis in value.shape]
    return Value(name=value.name, dtype=value.dtype.numpy().name, shape=shape)

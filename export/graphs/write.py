"""Write graphs as files that share one weights file."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from bonnx.runtime.artifact.folder import WEIGHTS
from bonnx.runtime.artifact.manifest import Graph, Value

from .prompt_options import PER_PROMPT

__all__ = ["raw_bytes", "write_graphs"]

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
    graphs = {}
    with (folder / "onnx" / WEIGHTS).open("wb") as file_of_weights:
        weights = _Weights(file_of_weights)
        for name, model in models:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                assert tensor is not None
                if tensor.nbytes >= _EXTERNAL_FROM:
                    value.const_value = weights.put(tensor, str(value.name))
            file = f"onnx/{name}{suffix}.onnx"
            (folder / file).write_bytes(ir.to_proto(model).SerializeToString())
            inputs, outputs = ([_value(v) for v in values] for values in (model.graph.inputs, model.graph.outputs))
            opset = model.graph.opset_imports[""]
            per_prompt = [str(value.name) for value in model.graph.inputs if PER_PROMPT in value.meta]
            graphs[name] = Graph(file=file, opset=opset, inputs=inputs, outputs=outputs, per_prompt=per_prompt)
            # Free the graph before the next one is traced.
            del model
    return graphs


class _Weights:
    """The file of weights, in which equal tensors are stored once."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._places = file, dict[str, tuple[int, int]]()
        self._known: dict[Hashable, tuple[object, tuple[int, int]]] = {}

    def put(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
        """Write a tensor if none equals it, and return where it is."""
        # Graphs share the model's tensors, so most are known by their memory, which is kept and thus not used again.
        raw = tensor.raw if isinstance(tensor, ir.Tensor) else None
        key = (raw.data_ptr(), raw.shape, raw.stride(), raw.dtype) if isinstance(raw, torch.Tensor) else None
        if key is not None and key in self._known:
            _, (offset, length) = self._known[key]
        else:
            # Alive until its bytes are written.
            whole = raw.detach().contiguous() if isinstance(raw, torch.Tensor) else np.ascontiguousarray(tensor.numpy())
            offset, length = self._put(_bytes(whole))
            if key is not None:
                self._known[key] = raw, (offset, length)
        shape = ir.Shape(tensor.shape.numpy())
        return ir.ExternalTensor(WEIGHTS, offset, length, tensor.dtype, shape=shape, name=name)

    def _put(self, data: memoryview) -> tuple[int, int]:
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._places[digest] = (self._file.tell(), len(data))
            self._file.write(data)
        return self._places[digest]


def raw_bytes(storage: torch.UntypedStorage) -> memoryview:
    """View a storage's bytes; unlike `numpy`, this lets it be resized later."""
    return memoryview((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))


def _bytes(whole: torch.Tensor | NDArray[Any]) -> memoryview:
    """View the bytes of a contiguous tensor or array, which must outlive the view."""
    if isinstance(whole, torch.Tensor):
        begin = whole.storage_offset() * whole.itemsize
        return raw_bytes(whole.untyped_storage())[begin : begin + whole.nbytes]
    return whole.reshape(-1).view(np.uint8).data


def _value(value: ir.Value) -> Value:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = [axis if isinstance(axis, int) else str(axis.value) for axis in value.shape]
    return Value(name=value.name, dtype=value.dtype.numpy().name, shape=shape)

"""What the host computes of a graph that runs on CUDA, and how it gets to the device.

The integers of the random generator have no CUDA kernel, and a branch, the trips of a loop and the size of a result
must be known on the host. ONNX Runtime places every operator for which it has a kernel on CUDA, and copies values to
and fro, unless all that the operator reads is an input of the graph, a small constant, or on the host because it was
computed from a shape. So `on_host` ties an input to a shape. What is computed from it stays on the host, up to an
operator that reads a computed size, such as `Expand`, `Reshape`, `Slice` or `Range`: that runs on CUDA, where its
result is. `to_device` copies several values at once.

On a CPU this is a few operators more, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .builder import Builder

__all__ = [
    "Sized",
    "host_range",
    "host_zero",
    "host_zeros",
    "on_host",
    "on_host_inside",
    "replaceable",
    "to_device",
    "to_device_as_floats",
]

INT, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
# A value, and the size [n] of the axis along which it is put together with others.
Sized = tuple[ir.Value, ir.Value]


def host_zero(b: Builder, value: ir.Value) -> ir.Value:
    """Return [0], computed from the first axis of a value on the device, which must not be fixed."""
    size = b.Shape(value, start=0, end=1)
    zero: ir.Value = b.Sub(size, size)
    return zero


def on_host(b: Builder, value: ir.Value, zero: ir.Value) -> ir.Value:
    """Keep on the host what is computed from an int64 input of the graph."""
    tied: ir.Value = b.Add(value, zero)
    return tied


def on_host_inside(b: Builder, value: ir.Value, zero: ir.Value) -> ir.Value:
    """Keep on the host what a loop's body computes from an int64 value that is on the host outside."""
    # CUDA has no such operator, so that ONNX Runtime does not move the value of another graph to the device.
    tied: ir.Value = b.BitwiseOr(value, zero)
    return tied


def host_zeros(b: Builder, count: ir.Value) -> ir.Value:
    """Zeros (n) int64 on the host; `count` is [n]."""
    # CUDA has no `Tile` of this type, so that the zeros are on the host although their number is computed.
    zeros: ir.Value = b.Cast(b.Tile(b.constant(np.zeros(1, np.uint32)), count), to=INT)
    return zeros


def host_range(b: Builder, count: ir.Value) -> ir.Value:
    """0, 1, ..., n - 1, int64, on the host; `count` is [n]."""
    ones = b.Cast(b.Tile(b.constant(np.ones(1, np.uint32)), count), to=INT)
    numbers: ir.Value = b.CumSum(ones, b.int(0), exclusive=1)
    return numbers


def to_device(b: Builder, axis: int, values: Sequence[Sized]) -> list[ir.Value]:
    """Copy values of one type to the device in one piece.

    They are put together along an axis, and must agree in the others. At least one size must be computed from a shape.
    """
    joined = b.Concat(*(value for value, _ in values), axis=axis)
    parts: list[ir.Value] = b.Split(joined, b.Concat(*(n for _, n in values), axis=0), axis=axis, _outputs=len(values))
    return parts


def to_device_as_floats(b: Builder, axis: int, ints: Sequence[Sized], floats: Sequence[Sized]) -> list[ir.Value]:
    """Copy int64 values, below 2**24 in magnitude, and float32 ones to the device in one piece: see `to_device`."""
    values = [*((b.Cast(value, to=FLOAT), size) for value, size in ints), *floats]
    parts = to_device(b, axis, values)
    return [*(b.Cast(part, to=INT) for part in parts[: len(ints)]), *parts[len(ints) :]]


def replaceable(*inputs: ir.Value) -> list[ir.Value]:
    """Let all that reads int64 inputs read new values instead, which may be replaced by what is made of the inputs."""
    parameters = [ir.val(f"{value.name}/read", INT) for value in inputs]
    for value, parameter in zip(inputs, parameters, strict=True):
        value.replace_all_uses_with(parameter)
    return parameters

"""Experts as an ONNX subgraph: a loop over the experts that were chosen, each of which computes its own tokens.

A layer's weights are stacked, so that a graph does not grow with the number of experts. The loop takes one expert's
weights from the stack and, where they have fewer bits, widens them to float32.

Shapes: M tokens, k experts of each, X experts, D hidden_size, I inner size of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import opset18, script
from onnxscript.values import Opset
from torch import Tensor, nn

from bonnx.models.experts import Experts, route

from ..precision.stored import Stored4, Stored8, Stored16
from .builder import DOMAIN

__all__ = ["FUNCTIONS", "ExpertsProduct"]

# Any, because the operators' type variables are too narrow for the values that onnxscript infers.
op: Any = opset18
this: Any = Opset("bonnx", 1)


@script(this, default_opset=opset18)
def add_expert(total, x, chosen, shares, number, gate, up, down):  # type: ignore[no-untyped-def]
    """Add the output of one expert for the tokens that chose it.

    Args:
        total: (M, D) float32, the sum of the experts before.
        x: (M, D) float32.
        chosen: (M, k) int64.
        shares: (M, k) float32.
        number: int64 scalar, the expert's.
        gate: (D, I) float32.
        up: (D, I) float32.
        down: (I, D) float32.

    Returns:
        (M, D) float32.
    """
    places = op.Transpose(op.NonZero(op.Equal(chosen, number)), perm=[1, 0])
    rows = op.Gather(places, op.Constant(value_ints=[0]), axis=1)
    tokens = op.GatherND(x, rows)
    gated = op.MatMul(tokens, gate)
    out = op.MatMul(op.Mul(op.Mul(gated, op.Sigmoid(gated)), op.MatMul(tokens, up)), down)
    share = op.Unsqueeze(op.GatherND(shares, places), op.Constant(value_ints=[1]))
    return op.ScatterND(total, rows, op.Mul(out, share), reduction="add")


@script(this, default_opset=opset18)
def widened8(stack, scale, number):  # type: ignore[no-untyped-def]
    """One expert's weights: (X, in, out) int8 and scales (X, 1, out) -> (in, out) float32."""
    return op.Mul(op.Cast(op.Gather(stack, number), to=1), op.Gather(scale, number))


@script(this, default_opset=opset18)
def widened4(stack, scale, inputs, number):  # type: ignore[no-untyped-def]
    """One expert's weights: (X, out, blocks, 16) uint8, scales (X, out, blocks, 1), in -> (in, out) float32."""
    packed = op.Gather(stack, number)
    last = op.Constant(value_ints=[3])
    low = op.Unsqueeze(op.BitwiseAnd(packed, op.Cast(op.Constant(value_int=15), to=2)), last)
    high = op.Unsqueeze(op.BitShift(packed, op.Cast(op.Constant(value_int=4), to=2), direction="RIGHT"), last)
    levels = op.Reshape(op.Concat(low, high, axis=3), op.Constant(value_ints=[0, 0, 32]))
    weights = op.Mul(op.Sub(op.Cast(levels, to=1), op.Constant(value_float=8.0)), op.Gather(scale, number))
    # The last block may be padded.
    flat = op.Reshape(weights, op.Constant(value_ints=[0, -1]))
    kept = op.Slice(flat, op.Constant(value_ints=[0]), inputs, op.Constant(value_ints=[1]))
    return op.Transpose(kept, perm=[1, 0])


@script(this, default_opset=opset18)
def chosen_by_any(chosen, stack):  # type: ignore[no-untyped-def]
    """The numbers of the experts that any token chose: (M, k) int64 and a stack (X, ...) -> int64, ascending.

    By marking them, because ONNX Runtime has `Unique` on the CPU only.
    """
    flat = op.Reshape(chosen, op.Constant(value_ints=[-1]))
    marks = op.Expand(op.Constant(value_float=1.0), op.Shape(flat))
    marked = op.ScatterElements(op.ConstantOfShape(op.Shape(stack, start=0, end=1)), flat, marks)
    return op.Reshape(op.NonZero(marked), op.Constant(value_ints=[-1]))


@script(this, default_opset=opset18)
def experts(x, chosen, shares, gate, up, down):  # type: ignore[no-untyped-def]
    """Sum the chosen experts, whose weights (X, in, out) are float32 or of 16 bits: (M, D) float32 -> (M, D)."""
    hit = chosen_by_any(chosen, gate)
    total = op.ConstantOfShape(op.Shape(x))
    for i in range(op.Size(hit)):
        number = op.Gather(hit, i)
        g = op.Cast(op.Gather(gate, number), to=1)
        u = op.Cast(op.Gather(up, number), to=1)
        d = op.Cast(op.Gather(down, number), to=1)
        total = op.Cast(add_expert(total, x, chosen, shares, number, g, u, d), to=1)
    return total


@script(this, default_opset=opset18)
def experts8(x, chosen, shares, gate, gate_scale, up, up_scale, down, down_scale):  # type: ignore[no-untyped-def]
    """Sum the chosen experts, whose weights are as in `widened8`: (M, D) float32 -> (M, D)."""
    hit = chosen_by_any(chosen, gate)
    total = op.ConstantOfShape(op.Shape(x))
    for i in range(op.Size(hit)):
        number = op.Gather(hit, i)
        g = widened8(gate, gate_scale, number)
        u = widened8(up, up_scale, number)
        d = widened8(down, down_scale, number)
        total = op.Cast(add_expert(total, x, chosen, shares, number, g, u, d), to=1)
    return total


@script(this, default_opset=opset18)
def experts4(x, chosen, shares, gate, gate_scale, up, up_scale, down, down_scale):  # type: ignore[no-untyped-def]
    """Sum the chosen experts; gate and up are as in `widened4`, down as in `widened8`: (M, D) float32 -> (M, D)."""
    hit = chosen_by_any(chosen, gate)
    total = op.ConstantOfShape(op.Shape(x))
    width = op.Shape(x, start=1, end=2)
    for i in range(op.Size(hit)):
        number = op.Gather(hit, i)
        g = widened4(gate, gate_scale, width, number)
        u = widened4(up, up_scale, width, number)
        d = widened8(down, down_scale, number)
        total = op.Cast(add_expert(total, x, chosen, shares, number, g, u, d), to=1)
    return total


FUNCTIONS = [add_expert, chosen_by_any, widened8, widened4, experts, experts8, experts4]


class ExpertsProduct(nn.Module):
    """`Experts` as the graphs compute them."""

    def __init__(self, ffn: Experts) -> None:
        super().__init__()
        self.count, self.normalize = ffn.count, ffn.normalize
        self.router = nn.Parameter(ffn.router.weight.detach().T, requires_grad=False)
        first = ffn.experts[0]
        self.function = "experts"
        if isinstance(first.gate, Stored8 | Stored4):
            self.function = "experts8" if isinstance(first.gate, Stored8) else "experts4"
        names = []
        for name in ("gate", "up", "down"):
            for place, tensors in enumerate(zip(*(_stored(getattr(one, name)) for one in ffn.experts), strict=True)):
                names.append(f"{name}_scale" if place else name)
                self.register_parameter(names[-1], nn.Parameter(torch.stack(tensors), requires_grad=False))
        self.names = tuple(names)

    def forward(self, x: Tensor) -> Tensor:
        """(M, D) -> (M, D)."""
        shares, chosen = route(x @ self.router, self.count, self.normalize)
        inputs = (x, chosen, shares, *(self.get_parameter(name) for name in self.names))
        out: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::{self.function}", inputs, {}, dtype=x.dtype, shape=x.shape)
        return out


def _stored(layer: nn.Module) -> list[Tensor]:
    """The tensors of one expert's layer in the graph: its weights, and their scales if it has any."""
    if isinstance(layer, Stored8):
        return [layer.weight.detach().T, layer.scale.detach()[None]]
    if isinstance(layer, Stored4):
        return [layer.packed.detach(), layer.scale.detach()[..., None]]
    assert isinstance(layer, nn.Linear | Stored16)
    return [layer.weight.detach().T]

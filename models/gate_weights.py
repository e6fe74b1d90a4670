"""The parameters of a gated scorer, computed from a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .gate import OBJECTIVES, SCALE, TRANSFORM, GateTensors

__all__ = ["gate_state"]

_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
# PyTorch's default, which the models use.
_EPSILON = 1e-5


def gate_state(gate: GateTensors, read: Callable[[dict[str, str]], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the parameters of a `GatedScorer`, computed from the tensors of a checkpoint.

    Args:
        gate: where they are.
        read: `Weights.read`.
    """
    tensors = read({name: name for name in (f"{OBJECTIVES}.weight", TRANSFORM, SCALE)})
    objectives, transform, scale = (tensor.double() for tensor in tensors.values())
    objectives = objectives.reshape(len(transform), gate.quantiles, -1).mean(1)
    mix = torch.eye(len(transform), dtype=torch.float64) if gate.transforms_objectives else transform
    if gate.transforms_objectives:
        objectives = transform.T @ objectives
    state = {"dense2.weight": objectives, "mix.weight": mix * scale[0]}
    for i, (layer, norm) in enumerate(zip(gate.layers, gate.norms, strict=True), 1):
        weight = read({"": f"{layer}.weight"})[""].double()
        bias = read({"": f"{layer}.bias"})[""].double() if layer in gate.biases else torch.zeros(len(weight)).double()
        if norm is not None:
            gain, shift, mean, var = (t.double() for t in read({n: f"{norm}.{n}" for n in _BATCH_NORM}).values())
            gain = gain / (var + _EPSILON).sqrt()
            bias = bias + weight @ (shift - mean * gain)
            weight = weight * gain
        divisor = gate.temperature if i == len(gate.layers) else 1.0
        state |= {f"gate.dense{i}.weight": weight / divisor, f"gate.dense{i}.bias": bias / divisor}
    return {f"network.scorer.{name}": tensor.float().contiguous() for name, tensor in state.items()}

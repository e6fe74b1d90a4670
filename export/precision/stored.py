"""Linear layers whose weights are stored with fewer bits and widened to float32 when they are used.

Experts are stored like this. Few tokens use each of them, so their time is that of reading weights, and products of
fewer bits would gain nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonnx.runtime.artifact.manifest import Precision

from .linear import BLOCK, Linear4, Linear8

__all__ = ["Stored4", "Stored8", "Stored16", "stored"]


class Stored16(nn.Module):
    """Weights (out, in) of 16 bits."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        # Weights beyond float16 would become infinite.
        limit = torch.finfo(dtype).max
        self.weight = nn.Parameter(linear.weight.detach().clamp(-limit, limit).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight.to(x.dtype))


class Stored8(nn.Module):
    """Weights (out, in) int8, with one scale per output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rounded = Linear8(linear, normed=False)
        self.weight, self.scale = rounded.weight, rounded.scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight.to(x.dtype) * self.scale[:, None].to(x.dtype))


class Stored4(nn.Module):
    """Weights (out, in) of 4 bits, with one scale per output and block of 32 inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rounded = Linear4(linear)
        self.packed, self.width = rounded.packed, rounded.width
        self.scale = nn.Parameter(rounded.scale.reshape(len(self.packed), -1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        levels = torch.stack([self.packed & 15, self.packed >> 4], -1).reshape(len(self.packed), -1, BLOCK)
        weight = (levels.to(x.dtype) - 8) * self.scale[..., None].to(x.dtype)
        return F.linear(x, weight.flatten(1)[:, : self.width])


def stored(linear: nn.Linear, precision: Precision) -> nn.Module:
    """Return a layer of a precision."""
    if precision == "int4":
        return Stored4(linear)
    if precision == "int8":
        return Stored8(linear)
    return Stored16(linear, torch.float16 if precision == "fp16" else torch.bfloat16)

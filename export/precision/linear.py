"""Linear layers and embeddings with 16-, 8- or 4-bit weights, computed as the graphs' products compute them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BLOCK", "MIN_SCALE", "NORMED_STEP", "Embedding8", "Embedding16", "Linear4", "Linear8", "Linear16"]

# 127 quantization levels reach 4.5 standard deviations; 7 in a million values of a normal distribution are clipped.
NORMED_STEP = 4.5 / 127
BLOCK = 32
# Replaces a scale of 0, by which nothing can be divided.
MIN_SCALE = 1e-30
# Rows that are rounded at a time; number of weights from which a layer keeps no float32 copy.
_ROWS, _LARGE = 4096, 2**21
# Half of float16's maximum; the maximum weight below which smaller ones may underflow float16; and what an output's
# weights are then scaled to sum to.
_HALF_RANGE, _HALF_SMALL, _HALF_SUM = 2.0**15, 2.0**-8, 2.0**8


class Linear16(nn.Module):
    """A linear layer with 16-bit weights.

    Args:
        linear: the layer.
        dtype: float16 or bfloat16.
        norm: the norm that produces its inputs, if any.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, norm: nn.Module | None = None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        largest, total = float(weight.abs().max()), float(weight.abs().sum(1).max())
        self.scale = 1.0
        """A power of two by which the stored weights must be multiplied; 1 unless float16 cannot hold the originals."""
        if dtype == torch.float16 and (total > _HALF_RANGE or 0 < largest < _HALF_SMALL):
            aim = _HALF_RANGE if total > _HALF_RANGE else _HALF_SUM
            self.scale = 2.0 ** math.ceil(math.log2(total / aim))
        weight = weight / self.scale
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        """(out, in)."""
        self.bias = linear.bias
        self.bounded = dtype == torch.bfloat16 or (norm is not None and _largest(weight, norm) < _HALF_RANGE)
        """Whether no input and no sum of products can exceed the range of the type."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), computed in the dtype of x."""
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)

    def in_halves(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), with inputs and outputs rounded to float16 as in the graphs' products."""
        rows = torch.ones(()) if self.bounded else x.abs().amax(-1, keepdim=True).clamp(min=MIN_SCALE)
        halves = (x / rows).to(torch.float16).to(torch.float32)
        y = F.linear(halves, self.weight.to(torch.float32)).to(torch.float16).to(torch.float32) * (rows * self.scale)
        return y if self.bias is None else y + self.bias


class Embedding16(nn.Module):
    """A token embedding that shares the 16-bit weights (V, E) of a vocabulary head."""

    def __init__(self, head: Linear16) -> None:
        super().__init__()
        self.weight, self.scale = head.weight, head.scale

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., E) float32."""
        rows = F.embedding(ids, self.weight).to(torch.float32)
        return rows if self.scale == 1 else rows * self.scale


class Linear8(nn.Module):
    """A linear layer with 8-bit weights and inputs."""

    def __init__(self, linear: nn.Linear, *, normed: bool) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = torch.cat([(rows.abs().amax(1) / 127).clamp(min=MIN_SCALE) for rows in torch.split(weight, _ROWS)])
        levels = zip(torch.split(weight, _ROWS), torch.split(scale, _ROWS), strict=True)
        rounded = torch.cat([(rows / step[:, None]).round().to(torch.int8) for rows, step in levels])
        self.weight = nn.Parameter(rounded, requires_grad=False)
        """(out, in) int8."""
        self.scale = nn.Parameter(scale, requires_grad=False)
        """(out,) float32: the scale of each output's weights."""
        self.bias = linear.bias
        self.normed = normed
        """Whether the inputs come from a norm and have its fixed range."""
        self._levels: Tensor | None = None
        # Verification runs the layer thousands of times, so a float copy saves time; for a large layer it is too big.
        if self.weight.numel() < _LARGE:
            self.keep(torch.float32)

    def keep(self, dtype: torch.dtype) -> None:
        """Also keep the weights in a floating-point type, so that they need not be converted at each call."""
        self._levels = self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        step: Tensor | float = NORMED_STEP
        if not self.normed:
            step = (x.abs().amax(-1, keepdim=True) * (1 / 127)).clamp(min=MIN_SCALE)
        levels = self.weight if self._levels is None else self._levels
        integers = F.linear((x / step).round().clamp(-128, 127), levels.to(x.dtype))
        y = integers * self.scale * step
        return y if self.bias is None else y + self.bias


class Linear4(nn.Module):
    """A linear layer with 4-bit weights and 8-bit inputs, both quantized in blocks."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        out, width = weight.shape
        blocks = F.pad(weight, (0, -width % BLOCK)).reshape(out, -1, BLOCK)
        levels, scale = _four_bits(blocks)
        self.packed = nn.Parameter((levels[..., ::2] | levels[..., 1::2] << 4).to(torch.uint8), requires_grad=False)
        """(out, in / 32, 16) uint8: two weights per byte, the first in the low half; the zero point is 8."""
        self.scale = nn.Parameter(scale, requires_grad=False)
        """(out, in / 32)."""
        self.bias = linear.bias
        self.width = width
        self._weight: Tensor | None = None
        if weight.numel() < _LARGE:
            self.keep(torch.float32)

    def keep(self, dtype: torch.dtype) -> None:
        """Also keep the weights in a floating-point type, so that they need not be unpacked at each call."""
        self._weight = self._widened(dtype)

    def _widened(self, dtype: torch.dtype) -> Tensor:
        levels = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(-2).to(dtype) - 8
        return (levels * self.scale[..., None]).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        padded = F.pad(x, (0, -self.width % BLOCK))
        blocks = padded.reshape(*padded.shape[:-1], -1, BLOCK)
        step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=MIN_SCALE)
        weight = self._widened(x.dtype) if self._weight is None else self._weight.to(x.dtype)
        return F.linear(((blocks / step).round() * step).flatten(-2), weight, self.bias)


class Embedding8(nn.Module):
    """A token embedding that shares the 8-bit weights (V, E) of a vocabulary head."""

    def __init__(self, head: Linear8) -> None:
        super().__init__()
        self.weight, self.scale = head.weight, head.scale

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 -> (..., E) float32."""
        return F.embedding(ids, self.weight).to(torch.float32) * F.embedding(ids, self.scale[:, None])


def _largest(weight: Tensor, norm: nn.Module) -> float:
    """Return an upper bound for the outputs of a norm, and for the sums of their products with weights (out, in).

    Before its own weights, a norm's output has length sqrt(in) at most; Cauchy-Schwarz bounds the sums.
    """
    parameters = {name: value.detach() for name, value in norm.named_parameters()}
    gain = parameters["weight"]
    shift = parameters.get("bias", torch.zeros_like(gain))
    length = math.sqrt(len(gain))
    inputs = length * gain.abs() + shift.abs()
    sums = length * (weight * gain).norm(dim=1) + weight.abs() @ shift.abs()
    return float(torch.maximum(inputs.max(), sums.max()))


def _four_bits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (..., 32) -> levels 0..15 (int64) and the scales (...) with the least squared error among a few."""
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    best = torch.full_like(extreme, torch.inf)
    scale = torch.ones_like(extreme)
    for share in torch.linspace(0.7, 1.05, 15).tolist():
        # The weight of largest magnitude, whatever its sign, maps to -8: that side has one more level.
        tried = extreme * (share / -8)
        tried = torch.where(tried == 0, 1.0, tried)
        error = ((blocks / tried).round().clamp(-8, 7) * tried - blocks).square().sum(-1, keepdim=True)
        scale, best = torch.where(error < best, tried, scale), torch.minimum(error, best)
    return (blocks / scale).round().clamp(-8, 7).to(torch.int64) + 8, scale[..., 0]

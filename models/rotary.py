"""Rotary positions (Su et al., 2021): the frequencies of a network, and the rotation of queries and keys.

Shapes: B rows, T positions, K head size, R the rotated features of each head (all K, or the first ones).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import NetworkConfig, RopeScaling

__all__ = ["Rotary", "Rotation", "inverse_frequencies", "rotate"]

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of each position's angles."""


def inverse_frequencies(config: NetworkConfig, *, sliding: bool = False) -> Tensor:
    """Return the rotary frequencies `theta^(-2i/R)`, scaled as configured: (R/2,) float32, radians per position.

    They are computed in float32 throughout, as in transformers, because at distant positions the last digit of a
    frequency matters. `dynamic` scaling and the long factors of `longrope` are not included, because they depend on the
    row's length.

    Args:
        config: the network's.
        sliding: return the unscaled frequencies of the layers with a sliding window, which have a theta of their own.
    """
    size, scaling = config.size_of_rotation, config.rope_scaling
    theta = config.sliding_rope_theta if sliding and config.sliding_rope_theta is not None else config.rope_theta
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2).to(torch.float32) / size)
    if sliding or scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        return _longrope(config, scaling.short_factors)
    kept = _kept(frequencies, theta, scaling)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _longrope(config: NetworkConfig, factors: list[float]) -> Tensor:
    """Return the frequencies divided by one factor each: (R/2,) float32."""
    exponents = torch.arange(0, config.size_of_rotation, 2).to(torch.float32) / config.size_of_rotation
    return 1.0 / (torch.tensor(factors) * config.rope_theta**exponents)


def _kept(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Return the share of each frequency that `llama3` and `yarn` leave unscaled, from 0 to 1."""
    if scaling.kind == "llama3":
        turns = scaling.original_max_positions * frequencies / (2 * math.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return blend.clamp(0.0, 1.0)
    size = 2 * len(frequencies)

    def place(turns: float) -> float:
        """Return the index of the frequency that makes `turns` turns within the original context."""
        return size * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = high + 0.001 if low == high else high
    return 1 - ((torch.arange(len(frequencies)) - low) / (high - low)).clamp(0.0, 1.0)


class Rotary(nn.Module):
    """The angles of positions, for all layers or for those with a sliding window."""

    frequencies: Tensor
    long_frequencies: Tensor
    """Of rows beyond the original context with `longrope`; else empty."""

    def __init__(self, config: NetworkConfig, *, sliding: bool = False) -> None:
        super().__init__()
        self.config, self.sliding = config, sliding
        self.scaling = None if sliding else config.rope_scaling
        for name in ("frequencies", "long_frequencies"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Compute the frequencies again, for a network that was built on the meta device."""
        self.frequencies = inverse_frequencies(self.config, sliding=self.sliding)
        scaling = self.scaling
        factors = scaling.long_factors if scaling is not None and scaling.kind == "longrope" else None
        # Also an empty tensor must leave the meta device.
        self.long_frequencies = torch.empty(0) if factors is None else _longrope(self.config, factors)

    def forward(self, positions: Tensor) -> Rotation:
        """Positions (B or 1, T) int64 -> cos and sin (B or 1, T, R/2) float32 of angles in float32."""
        angles, frequencies, scaling = positions.to(torch.float32)[:, :, None], self.frequencies, self.scaling
        if scaling is not None and scaling.depends_on_length:
            length = positions.amax(1).to(torch.float32)[:, None, None] + 1
            frequencies = self._of_length(length, frequencies, scaling)
        angles = angles * frequencies
        if scaling is not None and scaling.attention_factor != 1.0:
            return angles.cos() * scaling.attention_factor, angles.sin() * scaling.attention_factor
        return angles.cos(), angles.sin()

    def _of_length(self, length: Tensor, frequencies: Tensor, scaling: RopeScaling) -> Tensor:
        """Return the frequencies of rows, given their lengths (B, 1, 1): (B, 1, R/2)."""
        size, original = self.config.size_of_rotation, scaling.original_max_positions
        if scaling.kind == "dynamic":
            stretch = scaling.factor * length.clamp(min=original) / original - (scaling.factor - 1)
            return frequencies / stretch ** (torch.arange(0, size, 2) / (size - 2))
        return torch.where(length > original, self.long_frequencies, frequencies)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R features, in two halves: x (..., T, K), cos and sin (..., T, R/2) -> (..., T, K)."""
    size = 2 * cos.shape[-1]
    first, second = x[..., :size].chunk(2, dim=-1)
    parts = [first * cos - second * sin, first * sin + second * cos]
    return torch.cat(parts if size == x.shape[-1] else [*parts, x[..., size:]], dim=-1)

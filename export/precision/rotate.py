"""Rotate a network's residual stream, so that the outputs of norms have a range known in advance.

A few features of a trained network are many times larger than the others, and a fixed 8-bit range that covers them
leaves the others no resolution. A random orthogonal matrix Q spreads the large features over all of them, so that after
a norm every feature looks like a draw from N(0, 1). Inside the network the rotation is free, because the weights absorb
it (QuaRot, Ashkboos et al., 2024): a norm with weights w computes `w * rms(x)`, and
`W (w * rms(x)) = (W diag(w) Q) rms(x Q)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bonnx.models.block import FeedForward
from bonnx.models.config import NetworkConfig
from bonnx.models.network import TwoHeadedNetwork

__all__ = ["rotatable", "rotate"]


def rotatable(config: NetworkConfig) -> bool:
    """Whether a network can be rotated: a rotation commutes only with norms of root mean square before the layers.

    Routers of experts would have to read rotated features of 8 bits, so their networks are not rotated either.
    """
    return config.norm == "rms" and config.norm_place == "before" and not config.num_experts


def rotate(network: TwoHeadedNetwork, outliers: Tensor | None = None, seed: int = 0) -> None:
    """Rotate a network in place: it computes the same function in another basis, with block norms without weights.

    The network gets an input projection even if the original has none, and is rotated back before its final norm. The
    features in `outliers`, indices (K,), are left alone, because they would dominate every direction.
    """
    rotation = _orthogonal(network.config.hidden_size, outliers, seed)
    entry = network.input_projection
    if not isinstance(entry, nn.Linear):
        entry = nn.Linear(network.config.hidden_size, network.config.hidden_size, bias=False)
        entry.weight.data = torch.eye(network.config.hidden_size)
        network.input_projection = entry
    _rotate_outputs(entry, rotation)
    for block in network.layers():
        attention, ffn = block.attention, block.ffn
        assert isinstance(ffn, FeedForward)
        for norm, readers in (
            (block.attention_norm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.ffn_norm, (ffn.gate, ffn.up)),
        ):
            assert isinstance(norm, nn.RMSNorm)
            for reader in readers:
                reader.weight.data = _product(reader.weight * norm.weight, rotation)
            norm.weight.data = torch.ones_like(norm.weight)
        for writer in (attention.out_proj, ffn.down):
            _rotate_outputs(writer, rotation)
    back = nn.Linear(network.config.hidden_size, network.config.hidden_size, bias=False)
    back.weight.data = rotation.to(torch.float32)
    network.final_norm = nn.Sequential(back, network.final_norm)


def _rotate_outputs(linear: nn.Linear, rotation: Tensor) -> None:
    linear.weight.data = _product(rotation.T, linear.weight)
    if linear.bias is not None:
        linear.bias.data = _product(linear.bias, rotation)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.detach().double() @ b.detach().double()).to(torch.float32)


def _orthogonal(size: int, outliers: Tensor | None, seed: int) -> Tensor:
    """Return a random orthogonal matrix, float64, deterministic for a seed; the identity for the outliers."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.zeros(size, dtype=torch.bool)
    if outliers is not None:
        fixed[outliers] = True
    others = (~fixed).nonzero()[:, 0]
    random = torch.randn(len(others), len(others), dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(random)
    rotation = torch.eye(size, dtype=torch.float64)
    rotation[others[:, None], others] = q * r.diagonal().sign()
    return rotation

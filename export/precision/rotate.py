"""Turn a network's residual stream, so that what a norm gives lies in a range known in advance.

A few features of a trained network are many times larger than the others, and a fixed 8-bit range that holds them
leaves the others no digits. In a random orthogonal basis Q every feature carries a share of the large ones: after the
norm all look like draws from N(0, 1). The turn costs nothing inside the network, whose weights absorb it (QuaRot,
Ashkboos et al., 2024): a norm with weights w gives `w * rms(x)`, and `W (w * rms(x)) = (W diag(w) Q) rms(x Q)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bonnx.models.network import TwoHeadedNetwork

__all__ = ["rotate"]


def rotate(network: TwoHeadedNetwork, outliers: Tensor | None = None, seed: int = 0) -> None:
    """Turn a network in place: it computes the same in another basis, its block norms without weights.

    It then has a projection at its entry also where the original has none, and turns back before its final norm.
    Features that are `outliers`, indices (K,), stay what they are: they would drown the others in every direction.
    """
    turn = _orthogonal(network.config.hidden_size, outliers, seed)
    entry = network.input_projection
    if not isinstance(entry, nn.Linear):
        entry = nn.Linear(network.config.hidden_size, network.config.hidden_size, bias=False)
        entry.weight.data = torch.eye(network.config.hidden_size)
        network.input_projection = entry
    _turn_outputs(entry, turn)
    for block in network.layers():
        attention, ffn = block.attention, block.ffn
        for norm, readers in (
            (block.attention_norm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.ffn_norm, (ffn.gate, ffn.up)),
        ):
            for reader in readers:
                reader.weight.data = _product(reader.weight * norm.weight, turn)
            norm.weight.data = torch.ones_like(norm.weight)
        for writer in (attention.out_proj, ffn.down):
            _turn_outputs(writer, turn)
    back = nn.Linear(network.config.hidden_size, network.config.hidden_size, bias=False)
    back.weight.data = turn.to(torch.float32)
    network.final_norm = nn.Sequential(back, network.final_norm)


def _turn_outputs(linear: nn.Linear, turn: Tensor) -> None:
    linear.weight.data = _product(turn.T, linear.weight)
    if linear.bias is not None:
        linear.bias.data = _product(linear.bias, turn)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.detach().double() @ b.detach().double()).to(torch.float32)


def _orthogonal(size: int, outliers: Tensor | None, seed: int) -> Tensor:
    """A random orthogonal matrix, float64, the same for the same seed; the identity for the outliers."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.zeros(size, dtype=torch.bool)
    if outliers is not None:
        fixed[outliers] = True
    others = (~fixed).nonzero()[:, 0]
    random = torch.randn(len(others), len(others), dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(random)
    turn = torch.eye(size, dtype=torch.float64)
    turn[others[:, None], others] = q * r.diagonal().sign()
    return turn

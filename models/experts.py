"""A feed-forward network of experts, of which each token uses a few (Shazeer et al., 2017; Jiang et al., 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .block import FeedForward
from .config import NetworkConfig

__all__ = ["Experts", "route"]


def route(logits: Tensor, count: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Choose experts.

    Args:
        logits: of the router, (..., X).
        count: number of experts to choose, k.
        normalize: whether the shares are divided by their sum.

    Returns:
        shares (..., k) and numbers (..., k) int64 of the likeliest experts.
    """
    shares, chosen = logits.softmax(-1).topk(count, -1)
    return (shares / shares.sum(-1, keepdim=True) if normalize else shares), chosen


class Experts(nn.Module):
    """The sum of the chosen experts' outputs, each times its share."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.count, self.normalize = config.experts_per_token, config.normalize_experts
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config, config.size_of_expert) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        flat = x.flatten(0, -2)
        shares, chosen = route(self.router(flat), self.count, self.normalize)
        out = torch.zeros_like(flat)
        for number in sorted({*chosen.flatten().tolist()}):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, rows, self.experts[number](flat[rows]) * shares[rows, places, None])
        return out.reshape(x.shape)

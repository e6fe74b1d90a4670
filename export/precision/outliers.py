"""Find features so large that an 8-bit range covering them leaves the other features no resolution.

In a trained network, a few features of the residual stream may be thousands of times larger than the others, with norm
weights that scale them back down (massive activations, Sun et al., 2024). Running the network on random inputs finds
them, and their products stay float32 (LLM.int8(), Dettmers et al., 2022). Many networks have none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bonnx.models.block import FeedForward
from bonnx.models.network import LanguageModel, TwoHeadedNetwork

from .rotate import rotatable

__all__ = ["SplitLinear", "find_outliers"]

# Limits, as multiples of the root mean square of a row's other features. The first is for the inputs of norms: beyond
# it, the other features span about one of 127 levels. The second is for products that do not follow a norm and have one
# scale per row. Those lose the most: on SmolLM2 at int8, the inputs of `down` cost more than all others together.
_NORM_LIMIT, _ROW_LIMIT = 100.0, 50.0
_ROWS, _LENGTH = 4, 64


class SplitLinear(nn.Module):
    """A quantized linear layer whose outlier inputs stay float32.

    Args:
        linear: the layer.
        outliers: (K,) int64, the indices of the outlier inputs.
        fewer_bits: makes the quantized layer for the other inputs.
    """

    def __init__(self, linear: nn.Linear, outliers: Tensor, fewer_bits: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.outliers = nn.Parameter(outliers, requires_grad=False)
        kept = torch.ones(linear.in_features).index_fill(0, outliers, 0.0)
        self.kept = nn.Parameter(kept, requires_grad=False)
        """(in,): 0 for outliers, 1 for the others."""
        self.wide = nn.Linear(len(outliers), linear.out_features, bias=False)
        self.wide.weight = nn.Parameter(linear.weight.detach()[:, outliers], requires_grad=False)
        others = copy.deepcopy(linear)
        others.weight = nn.Parameter(linear.weight.detach() * kept, requires_grad=False)
        self.others = fewer_bits(others)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out: Tensor = self.others(x * self.kept) + self.wide(x[..., self.outliers])
        return out


def find_outliers(model: LanguageModel | TwoHeadedNetwork, seed: int = 0) -> dict[nn.Module, Tensor]:
    """Return the indices (K,) int64 of outlier inputs for each norm and linear layer of the blocks; K is often 0."""
    network = model.network if isinstance(model, LanguageModel) else model
    outliers: dict[nn.Module, Tensor] = {}

    def inspect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        outliers[module] = _indices_beyond(inputs[0].flatten(0, -2), _ROW_LIMIT if module in in_row else _NORM_LIMIT)

    watched: list[nn.Module] = []
    in_row: set[nn.Module] = {block.attention.out_proj for block in network.layers()}
    dense = [block.ffn for block in network.layers() if isinstance(block.ffn, FeedForward)]
    in_row |= {ffn.down for ffn in dense}
    if not rotatable(network.config):
        in_row |= {block.attention.q_proj for block in network.layers()} | {ffn.gate for ffn in dense}
    for block in network.layers():
        watched += [block.attention_norm, block.attention.q_proj, block.attention.out_proj]
        watched += [block.ffn_norm]
    for ffn in dense:
        watched += [ffn.gate, ffn.down]
    hooks = [module.register_forward_pre_hook(inspect) for module in watched]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            if isinstance(model, LanguageModel):
                ids = torch.randint(0, model.config.vocab_size, (_ROWS, _LENGTH), generator=generator)
                network.encode(model.embedding(ids))
            else:
                network.encode(torch.randn(_ROWS, _LENGTH, network.config.embed_dim, generator=generator))
    finally:
        for hook in hooks:
            hook.remove()
    for block in network.layers():
        # These layers have the same inputs as the ones inspected.
        outliers |= dict.fromkeys((block.attention.k_proj, block.attention.v_proj), outliers[block.attention.q_proj])
    for ffn in dense:
        outliers[ffn.up] = outliers[ffn.gate]
    return outliers


def _indices_beyond(x: Tensor, limit: float) -> Tensor:
    """Rows (M, in) -> indices of features beyond a limit; at most one feature in 16, the largest first to be kept."""
    size, most = x.shape[1], max(1, x.shape[1] // 16)
    ordinary = x.square().sort(1).values[:, : max(1, size - most)].mean(1, keepdim=True).sqrt().clamp(min=1e-30)
    distance, order = (x.abs() / ordinary).amax(0).topk(min(most, size))
    indices: Tensor = order[distance > limit].sort().values
    return indices

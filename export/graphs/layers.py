"""The network's layers in the form from which the graphs are traced.

They compute the same as `bonnx.models.network`, arranged for ONNX Runtime: activations stay 2-D between matrix
products, so that each product and its bias become one kernel; weights are stored as (in, out); the attention scale is
folded into the query weights.

Shapes: B rows, T positions, D hidden_size, H heads, G kv heads, R = H / G, K head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonnx.models.config import NetworkConfig
from bonnx.models.network import Block, LanguageModel, TwoHeadedNetwork, rotation

from ..precision.products import QuantizedNorm, product
from ..precision.quantize import Linear8
from .builder import DOMAIN

__all__ = ["MARK", "MASKED", "Layer", "Trunk", "additive"]

T = TypeVar("T")

# Far below any attention logit, yet far enough above the float32 minimum that two of them can be added.
MASKED = -1e30
# A placeholder operator that marks the start of each layer; `repeat_layers.py` removes it.
MARK = "Layer"


def additive(allowed: Tensor) -> Tensor:
    """Bool -> 0 where allowed, MASKED elsewhere, float32."""
    return torch.where(allowed, 0.0, MASKED)


class Layer(nn.Module):
    """One transformer block without the attention itself, which each graph computes in its own way."""

    def __init__(self, block: Block, *, fused: bool) -> None:
        super().__init__()
        attention, config = block.attention, block.attention.config
        self.heads, self.kv_heads, self.size = config.num_heads, config.num_kv_heads, config.size_of_head
        self.fused = fused
        scale = self.size**-0.5
        self.attention_norm, self.ffn_norm = (
            QuantizedNorm(norm) if isinstance(reader, Linear8) else norm
            for norm, reader in ((block.attention_norm, attention.q_proj), (block.ffn_norm, block.ffn.gate))
        )
        self.q = product(attention.q_proj, 1.0 if config.qk_norm else scale)
        self.k, self.v, self.out = map(product, (attention.k_proj, attention.v_proj, attention.out_proj))
        self.gate, self.up, self.down = map(product, (block.ffn.gate, block.ffn.up, block.ffn.down))
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.size, eps=config.norm_epsilon)
            self.q_norm.weight.data = attention.q_norm.weight.detach() * scale
            self.k_norm = attention.k_norm

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normed x (B * T, D), cos and sin (B, T, K/2) -> rotated and scaled queries (B, T, H, K)."""
        return self._rotated(self.q(x), self.heads, self.q_norm, cos, sin)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normed x (B * T, D), cos and sin (B, T, K/2) -> rotated keys (B, T, G, K)."""
        return self._rotated(self.k(x), self.kv_heads, self.k_norm, cos, sin)

    def values(self, x: Tensor, rows: int) -> Tensor:
        """Normed x (B * T, D) and B -> values (B, T, G, K)."""
        v: Tensor = self.v(x)
        return v.reshape(rows, -1, self.kv_heads, self.size)

    def _rotated(self, x: Tensor, heads: int, norm: nn.Module | None, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length = cos.shape[0], cos.shape[1]
        x = x.reshape(rows, length, heads, self.size)
        if norm is not None:
            x = norm(x)
        if self.fused:
            flat: Tensor = torch.onnx.ops.rotary_embedding(
                x.reshape(rows, length, heads * self.size), cos, sin, num_heads=heads
            )
            return flat.reshape(rows, length, heads, self.size)
        cos, sin = cos[:, :, None], sin[:, :, None]
        half = self.size // 2
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream x (M, D), attention output (M, H * K) -> (M, D) after the feed-forward network."""
        x = x + self.out(attended)
        y = self.ffn_norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class Trunk(nn.Module):
    """The parts that all graphs share: embedding and projection, layers, final norm, scorer."""

    def __init__(self, model: LanguageModel | TwoHeadedNetwork, *, activation: str, label: int, fused: bool) -> None:
        super().__init__()
        network = model.network if isinstance(model, LanguageModel) else model
        self.config: NetworkConfig = network.config
        self.embedding = model.embedding if isinstance(model, LanguageModel) else None
        projection = network.input_projection
        self.projection = None if isinstance(projection, nn.Identity) else product(projection)
        self.layers = nn.ModuleList(Layer(block, fused=fused) for block in network.layers())
        self.windows = self.config.windows
        self.marked = False
        final = network.final_norm
        # `rotate.py` inserts a product before the norm.
        self.final_norm = nn.Sequential(product(final[0]), final[1]) if isinstance(final, nn.Sequential) else final
        self.scorer = _with_products(network.scorer)
        self.activation, self.label = activation, label
        self.inverse_frequencies = nn.Parameter(network.inverse_frequencies.clone(), requires_grad=False)

    def embed(self, inputs: Tensor) -> Tensor:
        """Ids (...) or embeddings (..., E) -> (..., D or E)."""
        return inputs if self.embedding is None else self.embedding(inputs)

    def project(self, x: Tensor) -> Tensor:
        """(M, E) -> (M, D)."""
        return x if self.projection is None else self.projection(x)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, T) int64 -> cos and sin (B, T, K/2)."""
        return rotation(positions, self.inverse_frequencies, self.config.rope_scaling)

    def for_each_window(self, make: Callable[[int | None], T]) -> list[T]:
        """Call `make` once for each distinct sliding window; return one result for each layer."""
        results = {window: make(window) for window in dict.fromkeys(self.windows)}
        return [results[window] for window in self.windows]

    def enter(self, x: Tensor) -> Tensor:
        """Mark where the residual stream (M, D) enters a layer, if marking is on; it stays unchanged."""
        if not self.marked:
            return x
        marked: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::{MARK}", (x,), {}, dtype=x.dtype, shape=x.shape)
        return marked

    def score(self, normed: Tensor) -> Tensor:
        """Normed backbone (M, D) -> scores (M,) after the activation."""
        labels: Tensor = self.scorer(normed)
        if self.activation == "softmax":
            labels = labels.softmax(-1)
        scores = labels[:, self.label]
        return scores.sigmoid() if self.activation == "sigmoid" else scores


def _with_products(scorer: nn.Module) -> nn.Module:
    """A copy of a scorer of any kind, its linear layers computed as the graphs compute them."""
    twin = copy.deepcopy(scorer).eval()
    for parent in [*twin.modules()]:
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                setattr(parent, name, product(layer))
    return twin

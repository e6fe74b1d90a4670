"""The network's layers in the form from which the graphs are traced.

They compute the same as `bonnx.models.network`, arranged for ONNX Runtime: activations stay 2-D between matrix
products, so that each product and its bias become one kernel; weights are stored as (in, out); the attention scale is
folded into the query weights.

Shapes: B rows, T positions, D hidden_size, H heads, G kv heads, K head size, R rotated features of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from bonnx.models.block import ACTIVATIONS, Block, FeedForward
from bonnx.models.config import NetworkConfig
from bonnx.models.experts import Experts
from bonnx.models.network import LanguageModel, TwoHeadedNetwork
from bonnx.models.rotary import Rotation, rotate
from bonnx.models.scorer_kinds import GatedScorer
from bonnx.runtime.artifact.manifest import Scoring

from ..precision.linear import Linear8
from ..precision.products import Product32, QuantizedNorm, joint, product
from .builder import DOMAIN
from .experts import ExpertsProduct

__all__ = ["MARK", "MASKED", "Layer", "Trunk", "additive", "part"]

T = TypeVar("T")

# Far below any attention logit, yet far enough above the float32 minimum that two of them can be added.
MASKED = -1e30
# A placeholder operator that marks the start of each layer; `repeat_layers.py` removes it.
MARK = "Layer"


def additive(allowed: Tensor) -> Tensor:
    """Bool -> 0 where allowed, MASKED elsewhere, float32."""
    return torch.where(allowed, 0.0, MASKED)


def part(rotation: Rotation | None, start: int, length: int) -> Rotation | None:
    """The rotation of `length` positions from `start` on."""
    return rotation and (rotation[0].narrow(1, start, length), rotation[1].narrow(1, start, length))


class Layer(nn.Module):
    """One transformer block without the attention itself, which each graph computes in its own way."""

    def __init__(self, block: Block, *, fused: bool) -> None:
        super().__init__()
        attention, config = block.attention, block.attention.config
        self.heads, self.kv_heads, self.size = config.num_heads, config.num_kv_heads, config.size_of_head
        self.fused, self.cap, self.activation = fused, config.attention_cap, config.ffn_activation
        scale = self.size**-0.5
        self.attention_norm = _for_products(block.attention_norm, attention.q_proj)
        self.attention_out_norm, self.ffn_out_norm = block.attention_out_norm, block.ffn_out_norm
        self.q = product(attention.q_proj, 1.0 if config.qk_norm else scale)
        self.k, self.v, self.out = map(product, (attention.k_proj, attention.v_proj, attention.out_proj))
        self.experts = ExpertsProduct(block.ffn) if isinstance(block.ffn, Experts) else None
        self.ffn_norm = block.ffn_norm
        if isinstance(block.ffn, FeedForward):
            self.ffn_norm = _for_products(block.ffn_norm, block.ffn.gate)
            self.gate, self.up, self.down = map(product, (block.ffn.gate, block.ffn.up, block.ffn.down))
        self.q_norm = self.k_norm = None
        self.norm_all = config.qk_norm_over == "all"
        if config.qk_norm:
            self.q_norm = copy.deepcopy(attention.q_norm)
            self.q_norm.weight.data = attention.q_norm.weight.detach() * scale
            self.k_norm = attention.k_norm

    def of_few(self, x: Tensor, rows: int, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one token of a few rows, at 8 bits by one product and one rotation if possible.

        They are (B, 1, heads * K): for so few numbers a change of shape takes as long as computing them.
        """
        of_queries, of_keys = self.heads * self.size, self.kv_heads * self.size
        # In float32 one product takes as long as three, and its weights would be in memory beside those of the prompt.
        y = None if isinstance(self.q, Product32) else joint([self.q, self.k, self.v], x)
        if y is not None and self.q_norm is None:
            both, v = torch.split(y.reshape(rows, 1, of_queries + 2 * of_keys), [of_queries + of_keys, of_keys], 2)
            turned = self._rotated(both, rows, self.heads + self.kv_heads, None, rotation)
            q, k = torch.split(turned, [of_queries, of_keys], 2)
            return q, k, v
        parts = [self.q(x), self.k(x), self.v(x)] if y is None else torch.split(y, [of_queries, of_keys, of_keys], 1)
        q = self._rotated(parts[0], rows, self.heads, self.q_norm, rotation)
        k = self._rotated(parts[1], rows, self.kv_heads, self.k_norm, rotation)
        return q, k, parts[2].reshape(rows, 1, of_keys)

    def queries(self, x: Tensor, rows: int, rotation: Rotation | None) -> Tensor:
        """Normed x (B * T, D), B, cos and sin (B, T, R/2) -> rotated and scaled queries (B, T, H, K)."""
        return self._split(self._rotated(self.q(x), rows, self.heads, self.q_norm, rotation), self.heads)

    def keys(self, x: Tensor, rows: int, rotation: Rotation | None) -> Tensor:
        """Normed x (B * T, D), B, cos and sin (B, T, R/2) -> rotated keys (B, T, G, K)."""
        return self._split(self._rotated(self.k(x), rows, self.kv_heads, self.k_norm, rotation), self.kv_heads)

    def values(self, x: Tensor, rows: int) -> Tensor:
        """Normed x (B * T, D) and B -> values (B, T, G, K)."""
        v: Tensor = self.v(x)
        return v.reshape(rows, -1, self.kv_heads, self.size)

    def _rotated(self, x: Tensor, rows: int, heads: int, norm: nn.Module | None, rotation: Rotation | None) -> Tensor:
        """(B * T, heads * K), B -> (B, T, heads * K)."""
        # The rotation knows the length, which keeps the shape free of a division.
        length = -1 if rotation is None else rotation[0].shape[1]
        if norm is not None:
            x = norm(x) if self.norm_all else norm(x.reshape(rows, length, heads, self.size))
        x = x.reshape(rows, length, heads * self.size)
        if rotation is None:
            return x
        cos, sin = rotation
        if self.fused:
            size = 2 * cos.shape[2]
            rotated: Tensor = torch.onnx.ops.rotary_embedding(
                x, cos, sin, num_heads=heads, rotary_embedding_dim=0 if size == self.size else size
            )
            return rotated
        return rotate(self._split(x, heads), cos[:, :, None], sin[:, :, None]).flatten(2)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """(B, T, heads * K) -> (B, T, heads, K)."""
        return x.reshape(*x.shape[:2], heads, self.size)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream x (M, D), attention output (M, H * K) -> (M, D) after the feed-forward network."""
        x = x + self.attention_out_norm(self.out(attended))
        y = self.ffn_norm(x)
        if self.experts is not None:
            y = self.experts(y)
        else:
            y = self.down(ACTIVATIONS[self.activation](self.gate(y)) * self.up(y))
        out: Tensor = x + self.ffn_out_norm(y)
        return out


def _for_products(norm: nn.Module, reader: nn.Module) -> nn.Module:
    """A norm, given one of the layers that read it."""
    return QuantizedNorm(norm) if isinstance(reader, Linear8) and reader.normed else norm


class Trunk(nn.Module):
    """The parts that all graphs share: embedding and projection, layers, final norm, scorer."""

    def __init__(self, model: LanguageModel | TwoHeadedNetwork, scoring: Scoring, *, fused: bool) -> None:
        super().__init__()
        network = model.network if isinstance(model, LanguageModel) else model
        self.config: NetworkConfig = network.config
        self.embedding = model.embedding if isinstance(model, LanguageModel) else None
        projection = network.input_projection
        self.projection = None if isinstance(projection, nn.Identity) else product(projection)
        self.layers = nn.ModuleList(Layer(block, fused=fused) for block in network.layers())
        self.windows, self.kinds_of_rotation = self.config.windows, self.config.rotations
        self.marked = False
        final = network.final_norm
        # `rotate.py` inserts a product before the norm.
        self.final_norm = nn.Sequential(product(final[0]), final[1]) if isinstance(final, nn.Sequential) else final
        self.scorer = _with_products(network.scorer)
        self.activation, self.label, self.header = scoring.activation, scoring.label, scoring.gate_tokens
        self.rotaries = network.rotaries

    def embed(self, inputs: Tensor) -> Tensor:
        """Ids (...) or embeddings (..., E) -> (..., D or E)."""
        return inputs if self.embedding is None else self.embedding(inputs)

    def project(self, x: Tensor) -> Tensor:
        """(M, E) -> (M, D)."""
        x = x if self.config.embedding_scale == 1 else x * self.config.embedding_scale
        return x if self.projection is None else self.projection(x)

    def rotations(self, positions: Tensor) -> list[Rotation | None]:
        """Positions (B, T) int64 -> cos and sin (B, T, R/2) for each layer; None for one without rotation."""
        pairs: dict[str | None, Rotation | None] = {None: None}
        pairs |= {kind: rotary(positions) for kind, rotary in self.rotaries.items()}
        return [pairs[kind] for kind in self.kinds_of_rotation]

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

    def labels(self, normed: Tensor) -> Tensor:
        """Normed backbone (M, D) -> the scorer's outputs (M, O)."""
        labels: Tensor = self.scorer(normed)
        return labels

    def coefficients(self, normed: Tensor) -> Tensor:
        """Normed backbone (B, D) where the gate reads -> the weights of a gated scorer's objectives (B, O)."""
        assert isinstance(self.scorer, GatedScorer)
        return self.scorer.coefficients(normed)

    def score(self, labels: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """The scorer's outputs (M, O) -> scores (M,) after the activation.

        With the coefficients (B, O) of a gate, M is a multiple of B and all rows of a prompt stand together.
        """
        if coefficients is not None:
            rows, objectives = coefficients.shape
            scores = (labels.reshape(rows, -1, objectives) * coefficients[:, None]).sum(-1).reshape(labels.shape[0])
            return scores.sigmoid() if self.activation == "sigmoid" else scores
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

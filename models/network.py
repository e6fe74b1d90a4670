"""The two-headed network in PyTorch: a causal backbone, and a scorer for every position.

Shapes: B rows, T positions, E embed_dim, D hidden_size, H heads, G kv heads, K head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonnx.errors import InputError

from .config import ConfigError, LanguageModelConfig, NetworkConfig, RopeScaling
from .scorer_kinds import make_scorer

__all__ = [
    "Attention",
    "Block",
    "FeedForward",
    "LanguageModel",
    "TwoHeadedNetwork",
    "build",
    "initialize",
    "inverse_frequencies",
    "output_size",
    "recommended_defaults",
    "rotate",
    "rotation",
    "select_best_of_n",
    "without_scorer",
]


def inverse_frequencies(config: NetworkConfig) -> Tensor:
    """Return the rotary frequencies `theta^(-2i/K)`, scaled as configured: (K/2,) float32, radians per position.

    They are computed in float32 throughout, as in transformers, because at distant positions the last digit of a
    frequency matters. `dynamic` scaling is not included, because it depends on the row's length.
    """
    size, scaling = config.size_of_head, config.rope_scaling
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, size, 2).to(torch.float32) / size)
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    kept = _kept(frequencies, config.rope_theta, scaling)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


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


def rotation(positions: Tensor, frequencies: Tensor, scaling: RopeScaling | None) -> tuple[Tensor, Tensor]:
    """Positions (B or 1, T) int64 -> cos and sin (B or 1, T, K/2) float32 of angles in float32."""
    angles = positions.to(torch.float32)[:, :, None]
    if scaling is not None and scaling.kind == "dynamic":
        size, original = 2 * len(frequencies), scaling.original_max_positions
        length = positions.amax(1).to(torch.float32)[:, None, None] + 1
        stretch = scaling.factor * length.clamp(min=original) / original - (scaling.factor - 1)
        frequencies = frequencies / stretch ** (torch.arange(0, size, 2) / (size - 2))
    angles = angles * frequencies
    if scaling is not None and scaling.attention_factor != 1.0:
        return angles.cos() * scaling.attention_factor, angles.sin() * scaling.attention_factor
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions, rotate-half layout (Su et al., 2021): x (..., T, K), cos and sin (..., T, K/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention; query head h uses kv head h div (H / G)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        size = config.size_of_head
        self.config = config
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * size, bias=config.attention_bias)
        self.out_proj = nn.Linear(config.num_heads * size, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(size, eps=config.norm_epsilon)
            self.k_norm = nn.RMSNorm(size, eps=config.norm_epsilon)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D), cos and sin (B or 1, 1, T, K/2) -> q (B, H, T, K), k and v (B, G, T, K), q and k rotated."""
        size = self.config.size_of_head
        q = self.q_proj(x).unflatten(-1, (self.config.num_heads, size))
        k = self.k_proj(x).unflatten(-1, (self.config.num_kv_heads, size))
        v = self.v_proj(x).unflatten(-1, (self.config.num_kv_heads, size))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, D); mask (B or 1, 1, T, T) bool, True where a key may be attended to, or None for plain causal."""
        q, k, v = self.project(x, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        projected: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return projected


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.inner_size, bias=config.ffn_bias)
        self.up = nn.Linear(config.hidden_size, config.inner_size, bias=config.ffn_bias)
        self.down = nn.Linear(config.inner_size, config.hidden_size, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    """Pre-norm residual block: `x + attention(norm(x))`, then `x + ffn(norm(x))`."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin, mask))
        out: Tensor = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return out


class TwoHeadedNetwork(nn.Module):
    """Backbone and scorer over embeddings (Edifice's TestTimeCompute)."""

    inverse_frequencies: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        # As in the original, there is a projection only if the sizes differ.
        self.input_projection = (
            nn.Linear(config.embed_dim, config.hidden_size) if config.embed_dim != config.hidden_size else nn.Identity()
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm: nn.Module = (
            nn.LayerNorm(config.hidden_size, eps=config.final_norm_epsilon)
            if config.final_norm == "layer"
            else nn.RMSNorm(config.hidden_size, eps=config.final_norm_epsilon)
        )
        self.scorer = make_scorer(config)
        self.register_buffer("inverse_frequencies", inverse_frequencies(config), persistent=False)
        self.apply(initialize)

    def layers(self) -> Iterator[Block]:
        """Yield the blocks in order, typed as `Block`."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B or 1, T) int64 -> cos and sin (B or 1, 1, T, K/2) float32."""
        cos, sin = rotation(positions, self.inverse_frequencies, self.config.rope_scaling)
        return cos[:, None], sin[:, None]

    def surroundings(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Return what the blocks need besides x: cos and sin (B or 1, 1, T, K/2), and a mask for each block.

        A mask is (B, 1, T, T) bool, True where a key may be attended to, or None for plain causal.
        """
        windows = self.config.windows
        masks: dict[int | None, Tensor | None] = {None: None}
        if attention_mask is None and not any(windows):
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        else:
            if attention_mask is None:
                attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)
            # Positions count real tokens only, so that padding on either side does not change a score.
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            masks |= {window: self._mask(attention_mask, window) for window in set(windows)}
        cos, sin = (t.to(inputs_embeds.dtype) for t in self.rotation(positions))
        return cos, sin, [masks[window] for window in windows]

    def encode(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the backbone: (B, T, E) and an optional mask (B, T) of 0 and 1 -> normed output (B, T, D)."""
        cos, sin, masks = self.surroundings(inputs_embeds, attention_mask)
        x = self.input_projection(inputs_embeds)
        for block, mask in zip(self.layers(), masks, strict=True):
            x = block(x, cos, sin, mask)
        out: Tensor = self.final_norm(x)
        return out

    def _mask(self, attention_mask: Tensor, window: int | None) -> Tensor:
        """(B, T) -> (B, 1, T, T), True where query i may attend to key j; every query may attend to itself."""
        index = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        back = index[:, None] - index[None]
        causal = back >= 0
        if window is not None:
            causal = causal & (back < window)
        # A padding query without any key would become NaN and spoil its whole row.
        allowed: Tensor = causal & (attention_mask[:, None, None, :] > 0) | (back == 0)
        return allowed

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings (B, T, E) float32 and an optional mask (B, T) -> backbone (B, T, D), scores (B, T, num_labels)."""
        backbone = self.encode(inputs_embeds, attention_mask)
        return backbone, self.scorer(backbone)


class LanguageModel(nn.Module):
    """Token embedding, two-headed network and vocabulary head: one forward pass computes logits and scores."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.network.embed_dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.network = TwoHeadedNetwork(config.network)
        if config.vocabulary_head and not config.tie_embeddings:
            self.head = nn.Linear(config.network.hidden_size, config.vocab_size, bias=False)

    def logits(self, backbone: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, vocab_size)."""
        return F.linear(backbone, self.embedding.weight) if self.config.tie_embeddings else self.head(backbone)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Ids (B, T) int64 -> backbone (B, T, D), scores (B, T, labels), and logits (B, T, V) if it generates."""
        backbone, scores = self.network(self.embedding(input_ids), attention_mask)
        return (backbone, scores, self.logits(backbone)) if self.config.vocabulary_head else (backbone, scores)


def without_scorer(model: LanguageModel) -> LanguageModel:
    """Remove a language model's scorer, if it has one; the same object is returned.

    Raises:
        ConfigError: the model has no vocabulary head, so nothing would be left that it can do.
    """
    if not model.config.vocabulary_head:
        raise ConfigError("no scorer: expected a language model with a vocabulary head; this one only scores")
    network = msgspec.structs.replace(model.config.network, scorer_kind="none", num_labels=1)
    model.config = msgspec.structs.replace(model.config, network=network)
    model.network.config, model.network.scorer = network, make_scorer(network)
    return model


def initialize(module: nn.Module) -> None:
    """Initialize as the original does, except that final norms start at 1 (its U(+-sqrt 3) is an accident)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build(**options: Any) -> TwoHeadedNetwork:
    """Build the network for options of `NetworkConfig`; `embed_dim` is required.

    Raises:
        ConfigError: if an option is unknown, missing, of the wrong type or out of range.
    """
    return TwoHeadedNetwork(NetworkConfig.from_dict(options))


def output_size(**options: Any) -> int:
    """Return the backbone's width for these options: `hidden_size`, by default 256."""
    return int(options.get("hidden_size", 256))


def recommended_defaults() -> dict[str, Any]:
    """Return the original's recommended options."""
    return {
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "scorer_hidden": 128,
        "dropout": 0.1,
    }


def select_best_of_n(scores: Tensor) -> Tensor:
    """Scores (num_candidates, ...) -> the best candidate (...) int64; ties go to the lowest index, NaN never wins.

    If every score is NaN, the result is -1; the original returns the index of a NaN, which no caller wants.

    Raises:
        InputError: if the candidate axis is missing or empty.
    """
    if scores.ndim < 1 or scores.shape[0] < 1:
        raise InputError(f"scores need at least one candidate on axis 0; got shape {tuple(scores.shape)}")
    if not scores.is_floating_point():
        return scores.argmax(dim=0)
    usable = ~scores.isnan()
    # A score of -inf is valid and beats NaN, hence both conditions.
    best = torch.where(usable, scores, -torch.inf)
    first = (usable & (best == best.amax(dim=0))).to(torch.int64).argmax(dim=0)
    return torch.where(usable.any(dim=0), first, -1)

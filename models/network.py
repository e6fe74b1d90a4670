"""The two-headed network in PyTorch: a causal backbone, and a scorer for every position.

Shapes: B rows, T positions, E embed_dim, D hidden_size, R rotated features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonnx.errors import InputError

from .block import Block, capped
from .config import ConfigError, LanguageModelConfig, NetworkConfig
from .experts import Experts
from .rotary import Rotary, Rotation
from .scorer_kinds import make_scorer

__all__ = [
    "LanguageModel",
    "TwoHeadedNetwork",
    "build",
    "final_logits",
    "initialize",
    "output_size",
    "recommended_defaults",
    "select_best_of_n",
    "without_scorer",
]


class TwoHeadedNetwork(nn.Module):
    """Backbone and scorer over embeddings (Edifice's TestTimeCompute)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        # As in the original, there is a projection only if the sizes differ.
        self.input_projection = (
            nn.Linear(config.embed_dim, config.hidden_size) if config.embed_dim != config.hidden_size else nn.Identity()
        )
        self.blocks = nn.ModuleList(Block(config, _experts(config, i)) for i in range(config.num_layers))
        self.final_norm: nn.Module = (
            nn.LayerNorm(config.hidden_size, eps=config.final_norm_epsilon)
            if config.final_norm == "layer"
            else nn.RMSNorm(config.hidden_size, eps=config.final_norm_epsilon)
        )
        self.scorer = make_scorer(config)
        kinds = sorted({kind for kind in config.rotations if kind is not None})
        self.rotaries = nn.ModuleDict({kind: Rotary(config, sliding=kind == "sliding") for kind in kinds})
        self.apply(initialize)

    def layers(self) -> Iterator[Block]:
        """Yield the blocks in order, typed as `Block`."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    def rotations(self, positions: Tensor) -> list[Rotation | None]:
        """Positions (B or 1, T) int64 -> cos and sin (B or 1, 1, T, R/2) float32 for each layer, None if unrotated."""
        pairs: dict[str | None, Rotation | None] = {None: None}
        for kind, rotary in self.rotaries.items():
            cos, sin = rotary(positions)
            pairs[kind] = cos[:, None], sin[:, None]
        return [pairs[kind] for kind in self.config.rotations]

    def surroundings(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[list[Rotation | None], list[Tensor | None]]:
        """Return what each block needs besides x: its rotation, and its mask.

        Args:
            inputs_embeds: (B, T, E).
            attention_mask: (B, T) of 0 and 1; None if there is no padding.

        Returns:
            cos and sin (B or 1, 1, T, R/2) in the dtype of the embeddings, or None for a layer without rotation; and a
            mask (B, 1, T, T) bool, True where a key may be attended to, or None for plain causal.
        """
        windows, dtype = self.config.windows, inputs_embeds.dtype
        masks: dict[int | None, Tensor | None] = {None: None}
        if attention_mask is None and not any(windows):
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        else:
            if attention_mask is None:
                attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)
            # Positions count real tokens only, so that padding on either side does not change a score.
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            masks |= {window: self._mask(attention_mask, window) for window in set(windows)}
        rotations = [pair and (pair[0].to(dtype), pair[1].to(dtype)) for pair in self.rotations(positions)]
        return rotations, [masks[window] for window in windows]

    def enter(self, inputs_embeds: Tensor) -> Tensor:
        """Embeddings (..., E) -> the residual stream (..., D) of the first block."""
        scale = self.config.embedding_scale
        x: Tensor = self.input_projection(inputs_embeds if scale == 1 else inputs_embeds * scale)
        return x

    def encode(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the backbone: (B, T, E) and an optional mask (B, T) of 0 and 1 -> normed output (B, T, D)."""
        x = self.enter(inputs_embeds)
        for block, rotation, mask in zip(self.layers(), *self.surroundings(inputs_embeds, attention_mask), strict=True):
            x = block(x, rotation, mask)
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


def _experts(config: NetworkConfig, layer: int) -> Experts | None:
    """The feed-forward network of a layer, if it is one of experts."""
    dense = config.num_experts is None or layer in (config.dense_layers or [])
    return None if dense else Experts(config)


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
        head = F.linear(backbone, self.embedding.weight) if self.config.tie_embeddings else self.head(backbone)
        return final_logits(head, self.config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Ids (B, T) int64 -> backbone (B, T, D), scores (B, T, labels), and logits (B, T, V) if it generates."""
        backbone, scores = self.network(self.embedding(input_ids), attention_mask)
        return (backbone, scores, self.logits(backbone)) if self.config.vocabulary_head else (backbone, scores)


def final_logits(logits: Tensor, config: LanguageModelConfig) -> Tensor:
    """Scale and limit what the vocabulary head gives, as the config says."""
    if config.logit_scale != 1:
        logits = logits * config.logit_scale
    return logits if config.logit_cap is None else capped(logits, config.logit_cap)


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

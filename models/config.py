"""The configuration of a two-headed network: frozen, validated on creation, to and from JSON. It needs no torch."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from bonnx.errors import BonnxError, near_miss

__all__ = ["ConfigError", "LanguageModelConfig", "NetworkConfig", "RopeScaling", "ffn_inner_size"]


class ConfigError(BonnxError, ValueError):
    """An invalid configuration: the message names the option, its value and the rule."""


def ffn_inner_size(hidden_size: int) -> int:
    """Return the inner size of the original's gated FFN: hidden x 2.667 rounded, then rounded up to a multiple of 8."""
    raw = round(hidden_size * 2.667)
    return raw + (-raw) % 8


class _ValidatedConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class with conversion to and from JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Return every option, defaults included, as JSON-compatible values."""
        result: dict[str, Any] = msgspec.to_builtins(self)
        return result

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """Make a configuration of `data`.

        Raises:
            ConfigError: if a key is unknown (the message suggests a similar one), a value has the wrong type, or a
                value breaks a rule.
        """
        known = set(cls.__struct_fields__)
        for key in data:
            if key not in known:
                raise ConfigError(f"unknown option '{key}' in {cls.__name__}; {near_miss(key, sorted(known))}")
        try:
            return msgspec.convert(data, cls)
        except msgspec.ValidationError as e:
            raise ConfigError(f"{cls.__name__}: {e}") from e


class RopeScaling(_ValidatedConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the rotary frequencies are scaled to exceed the trained context.

    `linear` divides every frequency by `factor` (Chen et al., 2023). `dynamic` increases the base with the row's
    length once that exceeds the original context (NTK-aware scaling as in transformers). `llama3` divides the low
    frequencies by `factor`, keeps the high ones and interpolates between them (Llama 3.1 reference code). `yarn`
    interpolates similarly, by the number of turns that a frequency makes within the original context, and multiplies
    cosines and sines by `attention_factor` (Peng et al., 2023). `longrope` divides each frequency by its own factor,
    from `short_factors` in rows of up to the original context, else from `long_factors`, and multiplies by
    `attention_factor` too (Ding et al., 2024).
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: float
    original_max_positions: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether yarn rounds the bounds of its interpolation to whole frequencies."""
    attention_factor: float = 1.0
    short_factors: list[float] = []
    long_factors: list[float] = []

    @property
    def depends_on_length(self) -> bool:
        """Whether all frequencies of a row change once it is longer than the original context."""
        return self.kind in ("dynamic", "longrope")

    def __post_init__(self) -> None:
        if not self.factor >= 1.0:
            raise ConfigError(f"rope_scaling factor must be at least 1; got {self.factor}")
        if self.original_max_positions < 1:
            raise ConfigError(f"original_max_positions must be at least 1; got {self.original_max_positions}")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"llama3 scaling needs 0 < low_freq_factor < high_freq_factor; "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise ConfigError(f"yarn needs 0 < beta_slow < beta_fast; got {self.beta_slow} and {self.beta_fast}")
        if self.kind == "longrope" and not (self.short_factors and self.long_factors):
            raise ConfigError("longrope needs short_factors and long_factors")
        if not all(0 < factor < math.inf for factor in self.short_factors + self.long_factors):
            raise ConfigError("short_factors and long_factors must be above 0 and finite")
        if not self.attention_factor > 0:
            raise ConfigError(f"attention_factor must be above 0; got {self.attention_factor}")


class NetworkConfig(_ValidatedConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A causal backbone (grouped-query attention, rotary positions, gated FFN) and a scorer for every position.

    The defaults are the original's. The options after `dropout` exist for the backbones of common reward models; with
    their defaults the network is the original one.
    """

    embed_dim: int
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    scorer_hidden: int | list[int] = 128
    """Inner size of an `mlp` scorer or of the gate of a `gated` one, or the sizes of its inner layers."""
    dropout: float = 0.1

    head_dim: int | None = None
    """Head size; `hidden_size // num_heads` if None."""
    ffn_inner: int | None = None
    """Inner size of the gated FFN; `ffn_inner_size(hidden_size)` if None."""
    num_experts: int | None = None
    """If set, each layer's feed-forward network is one of so many experts, of which each token uses a few."""
    experts_per_token: int = 2
    expert_inner: int | None = None
    """Inner size of an expert; that of the gated FFN if None."""
    normalize_experts: bool = True
    """Whether the shares of the chosen experts are divided by their sum."""
    dense_layers: list[int] | None = None
    """Layers without experts, counted from 0; none if None."""
    attention_bias: bool = True
    """Whether the q, k and v projections have biases."""
    attention_output_bias: bool = True
    ffn_bias: bool = True
    norm_epsilon: float = 1e-6
    final_norm: Literal["layer", "rms"] = "layer"
    final_norm_epsilon: float = 1e-5
    ffn_activation: Literal["silu", "gelu_tanh"] = "silu"
    """Of the gate; with `gelu_tanh`, the approximation of GELU by tanh, the network is a GeGLU (Gemma)."""
    norm: Literal["rms", "layer"] = "rms"
    """The norms of the blocks."""
    norm_place: Literal["before", "after", "both"] = "before"
    """Whether attention and feed-forward network have a norm before them, behind them (OLMo 2) or both (Gemma 2)."""
    qk_norm: bool = False
    """RMSNorm of queries and keys before the rotation."""
    qk_norm_over: Literal["head", "all"] = "head"
    """Whether each head is normalized (Qwen3), or all heads of a position together (OLMo 2)."""
    attention_cap: float | None = None
    """Attention logits become `cap * tanh(logit / cap)` (Gemma 2)."""
    embedding_scale: float = 1.0
    """The embeddings are multiplied by it."""
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_size: int | None = None
    """Number of features of each head that are rotated, the first ones; all if None."""
    unrotated_layers: list[int] | None = None
    """Layers without rotation, counted from 0; none if None."""
    sliding_rope_theta: float | None = None
    """Theta of the layers with a sliding window, which is not scaled; if None, they rotate like the other layers."""
    sliding_window: int | None = None
    """Number of positions that each position attends to, itself included; all preceding ones if None."""
    sliding_layers: list[int] | None = None
    """Layers with the sliding window, counted from 0; all layers if None."""
    scorer_kind: Literal["mlp", "linear", "gated", "none"] = "mlp"
    """`none` only in a language model, which then generates but does not score."""
    scorer_activation: Literal["silu", "relu", "gelu", "tanh"] = "silu"
    """Between the layers of an `mlp` scorer, or of the gate."""
    scorer_bias: bool = True
    num_labels: int = 1

    def __post_init__(self) -> None:
        positive = ["embed_dim", "hidden_size", "num_layers", "num_heads", "num_kv_heads"]
        optional = (
            "num_labels",
            "head_dim",
            "ffn_inner",
            "sliding_window",
            "rotary_size",
            "num_experts",
            "expert_inner",
        )
        positive += [name for name in optional if getattr(self, name) is not None]
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.scorer_sizes or min(self.scorer_sizes) < 1:
            raise ConfigError(f"scorer_hidden must be at least 1; got {self.scorer_hidden}")
        finite = ["norm_epsilon", "final_norm_epsilon", "rope_theta", "embedding_scale"]
        finite += [name for name in ("sliding_rope_theta", "attention_cap") if getattr(self, name) is not None]
        for name in finite:
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0 and finite; got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads; got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.size_of_head < 2 or self.size_of_head % 2:
            raise ConfigError(
                f"the head size must be even for rotary positions; hidden_size {self.hidden_size} over "
                f"num_heads {self.num_heads} gives {self.size_of_head}"
                if self.head_dim is None
                else f"head_dim must be even for rotary positions; got {self.head_dim}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must be in [0, 1); got {self.dropout}")
        for name in ("sliding_layers", "unrotated_layers", "dense_layers"):
            for layer in getattr(self, name) or []:
                if not 0 <= layer < self.num_layers:
                    raise ConfigError(f"{name} must be from 0 to {self.num_layers - 1}; got {layer}")
        self._check_rotation()
        if self.num_experts is not None and not 1 <= self.experts_per_token <= self.num_experts:
            raise ConfigError(
                f"experts_per_token must be from 1 to num_experts {self.num_experts}; got {self.experts_per_token}"
            )

    def _check_rotation(self) -> None:
        size, scaling = self.size_of_rotation, self.rope_scaling
        if size % 2 or size > self.size_of_head:
            raise ConfigError(f"rotary_size must be even and at most the head size {self.size_of_head}; got {size}")
        if scaling is not None and scaling.kind == "dynamic" and size < 4:
            raise ConfigError(f"dynamic rope scaling needs a head size of at least 4; got {size}")
        for factors in ("short_factors", "long_factors"):
            if scaling is not None and scaling.kind == "longrope" and len(getattr(scaling, factors)) != size // 2:
                raise ConfigError(
                    f"{factors} must have one number for each of the {size // 2} frequencies; "
                    f"got {len(getattr(scaling, factors))}"
                )

    @property
    def has_scorer(self) -> bool:
        """Whether the positions get scores."""
        return self.scorer_kind != "none"

    @property
    def scorer_sizes(self) -> list[int]:
        """The inner sizes of an `mlp` scorer, or of the gate."""
        return [self.scorer_hidden] if isinstance(self.scorer_hidden, int) else self.scorer_hidden

    @property
    def windows(self) -> list[int | None]:
        """The sliding window of each layer."""
        return [
            self.sliding_window if self.sliding_layers is None or i in self.sliding_layers else None
            for i in range(self.num_layers)
        ]

    @property
    def rotations(self) -> list[Literal["full", "sliding"] | None]:
        """The rotation of each layer: that of all layers, that of layers with a sliding window, or none."""
        own = self.sliding_rope_theta is not None
        return [
            None if i in (self.unrotated_layers or []) else "sliding" if own and window is not None else "full"
            for i, window in enumerate(self.windows)
        ]

    @property
    def size_of_rotation(self) -> int:
        """Number of features of each head that are rotated."""
        return self.rotary_size if self.rotary_size is not None else self.size_of_head

    @property
    def size_of_head(self) -> int:
        """Size of one attention head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_heads

    @property
    def size_of_expert(self) -> int:
        """Inner size of an expert."""
        return self.expert_inner if self.expert_inner is not None else self.inner_size

    @property
    def inner_size(self) -> int:
        """Inner size of the gated FFN."""
        return self.ffn_inner if self.ffn_inner is not None else ffn_inner_size(self.hidden_size)


class LanguageModelConfig(_ValidatedConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token embedding, the two-headed network, and a vocabulary head after its backbone."""

    network: NetworkConfig
    vocab_size: int
    tie_embeddings: bool = True
    vocabulary_head: bool = True
    """Whether the model generates; reward models only score tokens."""
    logit_scale: float = 1.0
    """The logits of the vocabulary head are multiplied by it."""
    logit_cap: float | None = None
    """Then they become `cap * tanh(logit / cap)` (Gemma 2)."""

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise ConfigError(f"vocab_size must be at least 2; got {self.vocab_size}")
        for name in ("logit_scale", "logit_cap"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0 and finite; got {getattr(self, name)}")
        if not self.vocabulary_head and not self.network.has_scorer:
            raise ConfigError("a model needs a scorer or a vocabulary head; got neither")
        if self.tie_embeddings and self.network.embed_dim != self.network.hidden_size:
            raise ConfigError(
                f"tied embeddings need embed_dim equal to hidden_size; "
                f"got {self.network.embed_dim} and {self.network.hidden_size}"
            )

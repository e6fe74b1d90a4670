"""The supported model families of transformers and how their classes differ: one entry each.

To add a family whose blocks are made of the same parts, add its entry here and its name to `docs/reward_models.md`; the
tests take the families from this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

__all__ = ["FAMILIES", "Family"]

# Our modules of a block -> the names in a checkpoint. Modules of the same name are parts of one fused tensor.
_LLAMA = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.out_proj": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
_GEMMA2 = _LLAMA | {
    "attention_out_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_out_norm": "post_feedforward_layernorm",
}
_OLMO2 = _LLAMA | {
    "attention_out_norm": "post_attention_layernorm",
    "ffn_out_norm": "post_feedforward_layernorm",
}
_GLM = _LLAMA | {"ffn.gate": "mlp.gate_up_proj", "ffn.up": "mlp.gate_up_proj"}
_GLM4 = _GLM | {"attention_out_norm": "post_self_attn_layernorm", "ffn_out_norm": "post_mlp_layernorm"}
_PHI3 = _GLM | {f"attention.{part}_proj": "self_attn.qkv_proj" for part in "qkv"}
# One module for each expert; the number is its own.
_MIXTRAL = _LLAMA | {
    "ffn.router": "block_sparse_moe.gate",
    "ffn.experts.gate": "block_sparse_moe.experts.{}.w1",
    "ffn.experts.up": "block_sparse_moe.experts.{}.w3",
    "ffn.experts.down": "block_sparse_moe.experts.{}.w2",
}
_QWEN3_MOE = _LLAMA | {
    "ffn.router": "mlp.gate",
    **{f"ffn.experts.{part}": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")},
}
_INTERNLM2 = {
    "attention_norm": "attention_norm",
    **{f"attention.{part}_proj": "attention.wqkv" for part in "qkv"},
    "attention.out_proj": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn.gate": "feed_forward.w1",
    "ffn.up": "feed_forward.w3",
    "ffn.down": "feed_forward.w2",
}


@dataclass(frozen=True)
class Family:
    """How a family's classes read config.json, and what they compute.

    Attributes:
        name: prefix of the class names, as in `LlamaForSequenceClassification`.
        names: our modules of a block -> the names in a checkpoint.
        embedding: name of the token embedding in a checkpoint.
        vocabulary: name of the vocabulary head in a checkpoint.
        head_dim: default head size if config.json has none; `hidden_size // num_attention_heads` if None.
        num_key_value_heads: default number if config.json has none; `num_attention_heads` if None.
        tied: default of `tie_word_embeddings`.
        activation: default activation of the feed-forward network, by transformers' name.
        activation_field: the field that names it.
        qkv_bias: whether the q, k and v projections always have biases.
        bias_field: the field that adds biases to the attention's projections, or None.
        bias_default: its default.
        output_bias: whether it adds one to the output projection as well.
        reads_mlp_bias: whether `mlp_bias` adds biases to the feed-forward network.
        norm: kind of the norms.
        epsilon_field: the field with their epsilon.
        epsilon: its default.
        norm_place: where the norms of a block are.
        norm_offset: is added to the stored weights of the norms.
        qk_norm: what queries and keys are normalized over before the rotation, or None.
        sliding_window: `never`; `always`; `switch`, enabled by `use_sliding_window`; `optional`, enabled by it from
            layer `max_window_layers` on; or `layers`, in all layers but every `full_every`th.
        reads_layer_types: whether `layer_types` says which layers have the window.
        window: default of the field `sliding_window`.
        full_every: for `layers`: one layer in so many attends to all tokens.
        pattern_field: the field that may say otherwise, or None.
        scaled_embeddings: whether embeddings are multiplied by the square root of the hidden size.
        multipliers: whether Granite's four multipliers are read.
        reads_attention_scale: whether `query_pre_attn_scalar` replaces the head size in the attention's scale.
        caps: `attn_logit_softcapping` and `final_logit_softcapping`, where they are read -> the default.
        rope_theta: default theta.
        sliding_theta: default theta of layers with a sliding window, if they have one of their own.
        sliding_theta_field: the field with that theta in older configs, or None.
        partial_rotary: default share of each head that is rotated; None if heads are always rotated whole.
        interleaved: whether adjacent features are rotated instead of the halves of a head.
        unrotated_every: one layer in so many is not rotated, unless `no_rope_layers` says otherwise; 0 for none.
        num_experts: default number of experts; 0 if the family has none.
        experts_per_token: default number of experts that a token uses.
        tokenizer_class: the class that AutoTokenizer uses for the family if the checkpoint declares none.
    """

    name: str
    names: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    embedding: str = "embed_tokens"
    vocabulary: str = "lm_head"
    head_dim: int | None = None
    num_key_value_heads: int | None = None
    tied: bool = False
    activation: str = "silu"
    activation_field: Literal["hidden_act", "hidden_activation"] = "hidden_act"
    qkv_bias: bool = False
    bias_field: str | None = None
    bias_default: bool = False
    output_bias: bool = True
    reads_mlp_bias: bool = False
    norm: Literal["rms", "layer"] = "rms"
    epsilon_field: str = "rms_norm_eps"
    epsilon: float = 1e-6
    norm_place: Literal["before", "after", "both"] = "before"
    norm_offset: float = 0.0
    qk_norm: Literal["head", "all"] | None = None
    sliding_window: Literal["never", "always", "switch", "optional", "layers"] = "never"
    reads_layer_types: bool = True
    window: int | None = 4096
    full_every: int = 0
    pattern_field: str | None = None
    scaled_embeddings: bool = False
    multipliers: bool = False
    reads_attention_scale: bool = False
    caps: Mapping[str, float | None] = field(default_factory=dict)
    rope_theta: float = 10000.0
    sliding_theta: float | None = None
    sliding_theta_field: str | None = None
    partial_rotary: float | None = None
    interleaved: bool = False
    unrotated_every: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    tokenizer_class: str | None = None

    @property
    def reads(self) -> set[str]:
        """Fields that this family reads and others refuse."""
        names = set(self.caps)
        if self.multipliers:
            names |= {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}
        if self.reads_attention_scale:
            names |= {"query_pre_attn_scalar"}
        if self.partial_rotary is not None:
            names |= {"partial_rotary_factor"}
        return names | ({"no_rope_layers"} if self.unrotated_every else set())


_GEMMA = Family(
    "Gemma",
    head_dim=256,
    num_key_value_heads=16,
    tied=True,
    activation="gelu_pytorch_tanh",
    bias_field="attention_bias",
    norm_offset=1.0,
    scaled_embeddings=True,
    tokenizer_class="GemmaTokenizer",
)
_GEMMA2_FAMILY = replace(
    _GEMMA,
    name="Gemma2",
    names=_GEMMA2,
    num_key_value_heads=4,
    activation_field="hidden_activation",
    norm_place="both",
    sliding_window="layers",
    full_every=2,
    reads_attention_scale=True,
    caps={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
)
_OLMO2_FAMILY = Family(
    "Olmo2",
    names=_OLMO2,
    bias_field="attention_bias",
    epsilon=1e-5,
    norm_place="after",
    qk_norm="all",
    tokenizer_class="TokenizersBackend",
)
_GLM_FAMILY = Family(
    "Glm",
    names=_GLM,
    head_dim=128,
    num_key_value_heads=2,
    bias_field="attention_bias",
    bias_default=True,
    output_bias=False,
    epsilon=1.5625e-07,
    partial_rotary=0.5,
    interleaved=True,
    tokenizer_class="TokenizersBackend",
)

# By `model_type` of config.json.
FAMILIES = {
    "llama": Family("Llama", bias_field="attention_bias", reads_mlp_bias=True),
    "mistral": Family("Mistral", num_key_value_heads=8, sliding_window="always", tokenizer_class="TokenizersBackend"),
    "qwen2": Family("Qwen2", qkv_bias=True, sliding_window="optional", tokenizer_class="Qwen2Tokenizer"),
    "qwen3": Family(
        "Qwen3",
        head_dim=128,
        bias_field="attention_bias",
        qk_norm="head",
        sliding_window="optional",
        tokenizer_class="Qwen2Tokenizer",
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2_FAMILY,
    "gemma3_text": replace(
        _GEMMA2_FAMILY,
        name="Gemma3Text",
        full_every=6,
        pattern_field="sliding_window_pattern",
        qk_norm="head",
        caps={"final_logit_softcapping": None},
        rope_theta=1e6,
        sliding_theta=10000.0,
        sliding_theta_field="rope_local_base_freq",
    ),
    "phi3": Family(
        "Phi3",
        names=_PHI3,
        epsilon=1e-5,
        sliding_window="always",
        reads_layer_types=False,
        window=None,
        partial_rotary=1.0,
        tokenizer_class="TokenizersBackend",
    ),
    "olmo2": _OLMO2_FAMILY,
    "olmo3": replace(
        _OLMO2_FAMILY, name="Olmo3", sliding_window="layers", full_every=4, rope_theta=5e5, sliding_theta=5e5
    ),
    "smollm3": Family(
        "SmolLM3",
        num_key_value_heads=4,
        tied=True,
        bias_field="attention_bias",
        reads_mlp_bias=True,
        sliding_window="optional",
        window=None,
        rope_theta=2e6,
        unrotated_every=4,
    ),
    "granite": Family(
        "Granite",
        bias_field="attention_bias",
        reads_mlp_bias=True,
        multipliers=True,
        tokenizer_class="TokenizersBackend",
    ),
    "internlm2": Family(
        "InternLM2",
        names=_INTERNLM2,
        embedding="tok_embeddings",
        vocabulary="output",
        bias_field="bias",
        bias_default=True,
        tokenizer_class="TokenizersBackend",
    ),
    "stablelm": Family(
        "StableLm",
        num_key_value_heads=32,
        bias_field="use_qkv_bias",
        output_bias=False,
        norm="layer",
        epsilon_field="layer_norm_eps",
        epsilon=1e-5,
        partial_rotary=0.25,
        tokenizer_class="TokenizersBackend",
    ),
    "glm": _GLM_FAMILY,
    "mixtral": Family(
        "Mixtral",
        names=_MIXTRAL,
        num_key_value_heads=8,
        epsilon=1e-5,
        sliding_window="always",
        reads_layer_types=False,
        window=None,
        rope_theta=1e6,
        num_experts=8,
        experts_per_token=2,
        tokenizer_class="TokenizersBackend",
    ),
    "qwen3_moe": Family(
        "Qwen3Moe",
        names=_QWEN3_MOE,
        num_key_value_heads=4,
        bias_field="attention_bias",
        qk_norm="head",
        sliding_window="switch",
        reads_layer_types=False,
        num_experts=128,
        experts_per_token=8,
        tokenizer_class="Qwen2Tokenizer",
    ),
    "glm4": replace(_GLM_FAMILY, name="Glm4", names=_GLM4, norm_place="both"),
}

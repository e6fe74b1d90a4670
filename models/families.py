"""The supported model families of transformers and how their classes differ: one entry each.

To add a family whose blocks are like Llama's (pre-norm, grouped-query attention, SwiGLU, rotated halves), add its entry
here and its name to `docs/reward_models.md`; the tests take the families from this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """How a family's classes read config.json.

    Attributes:
        name: prefix of the class names, as in `LlamaForSequenceClassification`.
        head_dim: default head size if config.json has none; `hidden_size // num_attention_heads` if None.
        num_key_value_heads: default number if config.json has none; `num_attention_heads` if None.
        qkv_bias: whether the q, k and v projections always have biases.
        reads_attention_bias: whether `attention_bias` adds biases to all four projections.
        reads_mlp_bias: whether `mlp_bias` adds biases to the feed-forward network.
        qk_norm: whether each head's queries and keys are normalized before the rotation.
        sliding_window: `never`; `always`, by default 4096; or `optional`, enabled by `use_sliding_window` from layer
            `max_window_layers` on.
        tokenizer_class: the class that AutoTokenizer uses for the family if the checkpoint declares none.
    """

    name: str
    head_dim: int | None = None
    num_key_value_heads: int | None = None
    qkv_bias: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: Literal["never", "always", "optional"] = "never"
    tokenizer_class: str | None = None


# By `model_type` of config.json.
FAMILIES = {
    "llama": Family("Llama", reads_attention_bias=True, reads_mlp_bias=True),
    "mistral": Family("Mistral", num_key_value_heads=8, sliding_window="always", tokenizer_class="TokenizersBackend"),
    "qwen2": Family("Qwen2", qkv_bias=True, sliding_window="optional", tokenizer_class="Qwen2Tokenizer"),
    "qwen3": Family(
        "Qwen3",
        head_dim=128,
        reads_attention_bias=True,
        qk_norm=True,
        sliding_window="optional",
        tokenizer_class="Qwen2Tokenizer",
    ),
}

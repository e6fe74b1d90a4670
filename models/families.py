"""The families of transformers' models that are read, and how their classes differ: one entry each.

To add a family whose blocks are Llama's (pre-norm, grouped-query attention, SwiGLU, rotated halves), add its entry here
and its name to `docs/reward_models.md`; the tests take the families from this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """How the classes of a family read config.json.

    Attributes:
        name: prefix of the classes, as in `LlamaForSequenceClassification`.
        head_dim: the size of a head if config.json has none; `hidden_size // num_attention_heads` if None.
        num_key_value_heads: their number if config.json lacks the field; `num_attention_heads` if None.
        qkv_bias: whether the q, k and v projections have biases, whatever config.json says.
        reads_attention_bias: whether `attention_bias` gives all four projections biases.
        reads_mlp_bias: whether `mlp_bias` gives the feed-forward network biases.
        qk_norm: whether each head's queries and keys are normed before the rotation.
        sliding_window: `never`; `always`, 4096 if config.json lacks the field; or `optional`, with
            `use_sliding_window` and from layer `max_window_layers` on.
        tokenizer_class: what AutoTokenizer takes for the family if the checkpoint declares no class.
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

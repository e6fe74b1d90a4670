"""Translate the metadata and tensor names of GGUF files to the config.json and names of transformers.

The names are those of llama.cpp (`src/llama-arch.cpp`). What its converter changes in the values is undone: the rows of
queries and keys are reordered for rotating adjacent features, and Gemma's norms are stored with 1 added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from .config import ConfigError
from .families import FAMILIES, Family
from .gguf import GGUFFile, GGUFWeights, Stored

__all__ = ["translate_gguf"]

# `general.architecture` -> `model_type`.
_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
    "granite": "granite",
}
# Architectures whose queries and keys llama.cpp rotates by adjacent features.
_PERMUTED = {"llama", "smollm3", "granite"}
_GEMMA = {"gemma", "gemma2", "gemma3"}
# Our modules of a block -> llama.cpp's.
_BLOCK = {
    "attention_norm": "attn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention.out_proj": "attn_output",
    "attention_out_norm": "post_attention_norm",
    "ffn_norm": "ffn_norm",
    "ffn_out_norm": "post_ffw_norm",
    "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
}
# Where q, k and v, or gate and up, are one tensor.
_FUSED = {"attn_q": "attn_qkv", "attn_k": "attn_qkv", "attn_v": "attn_qkv", "ffn_gate": "ffn_up"}
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# llama3's scaling in every model that has it; the file has only its result.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Gemma's models of 27B have another attention scale: architecture -> number of their layers.
_LARGE = {"gemma2": 46, "gemma3": 62}


def translate_gguf(file: GGUFFile) -> tuple[dict[str, Any], GGUFWeights]:
    """Return the config.json that the model of a GGUF file would have, and its tensors by transformers' names.

    Raises:
        ConfigError: if the architecture is not supported, or a field is missing or has an unsupported value.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in _TYPES:
        raise ConfigError(
            f"{file.path}: 'general.architecture' {architecture!r} is not supported; supported are {', '.join(_TYPES)}"
        )
    family = FAMILIES[_TYPES[architecture]]
    reader = _Reader(file, architecture)
    layers = reader.whole("block_count")
    stored = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    if layers != len(stored):
        raise reader.error("block_count", f"{len(stored)}, the number of layers of which the file has tensors", layers)
    names = _names(family, layers, set(file.tensors))
    config = _config(reader, family, layers)
    tensors = {names.get(name, name): stored for name, stored in file.tensors.items() if name not in _ROPE_TENSORS}
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name in file.tensors:
        part = name.split(".")[-2] if "." in name else ""
        if architecture in _PERMUTED and part in heads:
            changes[names[name]] = _unpermuted(heads[part])
        elif architecture in _GEMMA and part.endswith("norm"):
            changes[names[name]] = _without_one
    if "score.weight" in tensors:
        config["architectures"] = [f"{family.name}ForSequenceClassification"]
        config |= _labels(reader, tensors["score.weight"], changes)
    return config, GGUFWeights(tensors, changes)


class _Reader:
    """Reads metadata of an architecture; errors name the key."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def get(self, key: str) -> Any:
        """Return a value of this architecture; None if it is missing."""
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number; of a value for each layer, the one that all share."""
        value = self.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, "a whole number, the same for all layers", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "a number", value)
        # Stored as float32: 1e-5 is the double nearest to what its decimal digits say.
        return float(f"{value:.7g}")

    def error(self, key: str, expected: str, value: Any) -> ConfigError:
        return ConfigError(f"{self.file.path}: '{self.architecture}.{key}': expected {expected}; found {value!r:.80}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a matrix that every model has."""
        stored = self.file.tensors.get(name)
        if stored is None or len(stored.shape) != 2:
            raise ConfigError(f"{self.file.path}: expected a matrix '{name}'; the file is incomplete")
        return stored.shape


def _names(family: Family, layers: int, present: set[str]) -> dict[str, str]:
    """Map llama.cpp's names to those of transformers' classes."""
    names = {
        "token_embd.weight": f"model.{family.embedding}.weight",
        "output.weight": f"{family.vocabulary}.weight",
        "output_norm.weight": "model.norm.weight",
        "cls.output.weight": "score.weight",
        "cls.output.bias": "score.bias",
    }
    fused = {theirs for theirs in family.names.values() if [*family.names.values()].count(theirs) > 1}
    for module, theirs in family.names.items():
        stored = _BLOCK[module]
        if theirs in fused:
            stored = _FUSED.get(stored, stored)
        for i in range(layers):
            for kind in ("weight", "bias"):
                if f"blk.{i}.{stored}.{kind}" in present:
                    names[f"blk.{i}.{stored}.{kind}"] = f"model.layers.{i}.{theirs}.{kind}"
    return names


def _config(reader: _Reader, family: Family, layers: int) -> dict[str, Any]:
    """Return the config.json of a language model."""
    metadata, architecture = reader.file.metadata, reader.architecture
    present = reader.file.tensors
    vocabulary, hidden = reader.shape("token_embd.weight")
    heads = reader.whole("attention.head_count")
    kv_heads = reader.whole("attention.head_count_kv", heads)
    fused = "blk.0.attn_qkv.weight" in present
    rows = reader.shape("blk.0.attn_qkv.weight" if fused else "blk.0.attn_q.weight")[0]
    head = rows // max(1, heads + 2 * kv_heads if fused else heads)
    sizes = {"embedding_length": hidden, "attention.key_length": head, "attention.value_length": head}
    if family.partial_rotary is None:
        sizes["rope.dimension_count"] = head
    for key, size in sizes.items():
        if reader.whole(key, size) != size:
            raise reader.error(key, f"{size}, as the shapes of the tensors imply", reader.get(key))
    config: dict[str, Any] = {
        "model_type": _TYPES[architecture],
        "architectures": [f"{family.name}ForCausalLM"],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "intermediate_size": reader.whole("feed_forward_length"),
        "max_position_embeddings": reader.whole("context_length"),
        family.epsilon_field: reader.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in present,
        **_special_tokens(metadata),
    }
    if family.bias_field is not None:
        config[family.bias_field] = "blk.0.attn_q.bias" in present
    if family.reads_mlp_bias:
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in present
    if architecture in ("gemma2", "gemma3"):
        # As llama.cpp does, since the file does not say.
        config["query_pre_attn_scalar"] = hidden // heads if layers == _LARGE[architecture] else head
        for name in family.caps:
            config[name] = reader.get(name)
    if architecture == "granite":
        names = {"attention_multiplier": "attention.scale", "logits_scaling": "logit_scale"}
        names |= {"embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale"}
        config |= {name: reader.number(key) for name, key in names.items() if reader.get(key) is not None}
    window = reader.whole("attention.sliding_window", 0)
    if window and family.sliding_window in ("always", "layers"):
        config["sliding_window"] = window
    elif window and window < config["max_position_embeddings"]:
        raise reader.error("attention.sliding_window", "none for this architecture", window)
    return config | _rope(reader, head)


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of the special tokens; generation ends at the end of a text or of a turn."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    ends = list(dict.fromkeys(token for token in (ids["eos"], ids["eot"]) if token is not None))
    tokens = {"bos_token_id": ids["bos"], "eos_token_id": ends or None, "pad_token_id": ids["padding"]}
    return {name: token for name, token in tokens.items() if token is not None}


def _rope(reader: _Reader, head: int) -> dict[str, Any]:
    """Return the rotary parameters of config.json."""
    theta = reader.number("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = reader.get("rope.scaling.type")
    context = reader.whole("context_length")
    original = reader.whole("rope.scaling.original_context_length", context)
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": reader.number("rope.scaling.factor")}
        if kind == "yarn":
            rope |= {"original_max_position_embeddings": original}
            for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
                if reader.get(f"rope.scaling.{key}") is not None:
                    rope[name] = reader.number(f"rope.scaling.{key}")
    elif kind not in (None, "none", "longrope"):
        raise reader.error("rope.scaling.type", "none, linear, yarn or longrope", kind)
    if kind == "yarn" and reader.number("rope.scaling.attn_factor", 1.0) != 1:
        raise reader.error("rope.scaling.attn_factor", "1 with yarn", reader.get("rope.scaling.attn_factor"))
    if reader.architecture == "gemma3":
        local = reader.number("rope.freq_base_swa", 10000.0)
        return {
            "rope_parameters": {
                "full_attention": rope,
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            }
        }
    config: dict[str, Any] = {}
    if "rope_factors_long.weight" in reader.file.tensors:
        rope |= {"rope_type": "longrope", "factor": context / original}
        for name in ("long", "short"):
            rope[f"{name}_factor"] = _values(reader, f"rope_factors_{name}.weight")
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"] = original
    elif "rope_freqs.weight" in reader.file.tensors:
        rope |= _frequencies(_values(reader, "rope_freqs.weight"), theta, context)
    if FAMILIES[_TYPES[reader.architecture]].partial_rotary is not None:
        rope["partial_rotary_factor"] = reader.whole("rope.dimension_count", head) / head
    return {**config, "rope_parameters": rope}


def _values(reader: _Reader, name: str) -> list[float]:
    """Read a vector of float32."""
    if name not in reader.file.tensors:
        raise ConfigError(f"{reader.file.path}: expected a tensor '{name}'; the file is incomplete")
    values: list[float] = GGUFWeights({name: reader.file.tensors[name]}, {}).read({name: name})[name].tolist()
    return values


def _frequencies(factors: list[float], theta: float, context: int) -> dict[str, Any]:
    """Return the scaling whose result are these divisors of the frequencies: llama3's, or one of no name."""
    wavelengths = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))
    low, high, original = (float(value) for value in _LLAMA3.values())
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    factor = max(factors)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if np.allclose(factors, expected, rtol=1e-4):
        return {"rope_type": "llama3", "factor": float(f"{factor:.7g}"), **_LLAMA3}
    same = {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    return {"rope_type": "longrope", "factor": 1.0, "original_max_position_embeddings": context, **same}


def _labels(reader: _Reader, score: Stored, changes: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, Any]:
    """Return the fields of a classifier; of yes and no, the probability of yes is the score."""
    names = reader.get("classifier.output_labels") or []
    names = names if isinstance(names, list) and len(names) == score.shape[0] else []
    if [str(name).lower() for name in names] == ["yes", "no"]:
        # The second of two labels is the score.
        changes["score.weight"] = changes["score.bias"] = lambda stored: stored.flip(0)
        names = names[::-1]
    labels = {i: str(name) for i, name in enumerate(names)}
    return {"id2label": labels} if labels else {"num_labels": score.shape[0]}


def _unpermuted(heads: int) -> Callable[[Tensor], Tensor]:
    """Return what brings rows of heads that rotate adjacent features back to those that rotate halves."""

    def change(stored: Tensor) -> Tensor:
        pairs = stored.reshape(heads, len(stored) // heads // 2, 2, *stored.shape[1:])
        return pairs.transpose(1, 2).reshape(stored.shape)

    return change


def _without_one(stored: Tensor) -> Tensor:
    return stored - 1

"""Read the backbone from a config.json of transformers: its options, and the names of its blocks' tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .config import ConfigError, NetworkConfig, RopeScaling
from .families import FAMILIES
from .head import PARTS

__all__ = ["FARTHEST", "ConfigReader", "backbone_options", "block_names"]

# Far above any size and any position of a real model; larger numbers would overflow before they could be refused.
_LARGEST, FARTHEST = 2**20, 2**31 - 1
_ROPE_NUMBERS = (
    *("rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings", "low_freq_factor"),
    *("high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
)


class ConfigReader:
    """Reads fields of a config.json whose family is in `FAMILIES`; errors name the field."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.family = FAMILIES[config["model_type"]]

    def whole(self, name: str, default: int | None = None, most: int = _LARGEST) -> int:
        """Return a whole number from 1 to `most`.

        Raises:
            ConfigError: if the field has another value.
        """
        value = self.config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ConfigError(f"config.json, '{name}': expected a whole number from 1 to {most}; found {value!r:.40}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean.

        Raises:
            ConfigError: if the field has another value.
        """
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ConfigError(f"config.json, '{name}': expected true or false; found {value!r}")
        return value


def backbone_options(fields: ConfigReader, tensors: int) -> dict[str, Any]:
    """Return the options of `NetworkConfig` for the backbone that a config.json describes.

    Args:
        fields: the config.json.
        tensors: number of tensors in the checkpoint.

    Raises:
        ConfigError: if a field has an invalid value.
    """
    config, family = fields.config, fields.family
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    # Each layer has tensors, so more layers than tensors are refused before anything is built.
    layers = fields.whole("num_hidden_layers", most=max(1, tensors))
    if config.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"config.json: 'hidden_size' {hidden} is not a multiple of 'num_attention_heads' {heads}")
    bias = family.reads_attention_bias and fields.flag("attention_bias", False)
    window, sliding = _sliding(fields, layers)
    # If the field is missing, the family's default applies; null means as many as there are heads.
    kv_heads = heads if "num_key_value_heads" in config else family.num_key_value_heads or heads
    theta, scaling = _rope(fields)
    return {
        "embed_dim": hidden,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.whole("num_key_value_heads", kv_heads),
        "head_dim": fields.whole("head_dim", family.head_dim or hidden // heads),
        "ffn_inner": fields.whole("intermediate_size"),
        "dropout": 0.0,
        "attention_bias": bias or family.qkv_bias,
        "attention_output_bias": bias,
        "ffn_bias": family.reads_mlp_bias and fields.flag("mlp_bias", False),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "final_norm": "rms",
        "final_norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "qk_norm": family.qk_norm,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": window,
        "sliding_layers": sliding,
    }


def _sliding(fields: ConfigReader, layers: int) -> tuple[int | None, list[int] | None]:
    """Return the sliding window, and the layers that have it (None: all)."""
    config, kind = fields.config, fields.family.sliding_window
    # The classes default to 4096; a config written by them has null if there is no window.
    has_window = kind == "always" or (kind == "optional" and fields.flag("use_sliding_window", False))
    window = config.get("sliding_window", 4096) if has_window else None
    window = None if window is None else fields.whole("sliding_window", 4096, FARTHEST)
    layer_types = config.get("layer_types")
    if layer_types is None:
        if window is None or kind == "always":
            return window, None
        first = config.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise ConfigError(f"config.json, 'max_window_layers': expected a whole number; found {first!r:.40}")
        layer_types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    known = ("full_attention", "sliding_attention")
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != layers
        or not all(name in known for name in layer_types)
    ):
        raise ConfigError(
            f"config.json, 'layer_types': expected 'full_attention' or 'sliding_attention' for each of {layers} "
            f"layers; found {layer_types!r:.200}"
        )
    sliding = [i for i, name in enumerate(layer_types) if name == "sliding_attention"]
    if sliding and window is None:
        raise ConfigError(
            f"config.json, 'layer_types': layer {sliding[0]} is 'sliding_attention', but there is no window: expected "
            + ("a number as 'sliding_window'" if kind == "always" else "'use_sliding_window' true and 'sliding_window'")
        )
    return (window, sliding) if sliding else (None, None)


def _numbers(rope: Any, name: str) -> dict[str, Any]:
    """Check that the rotary parameters are an object whose numeric fields are numbers; return a copy."""
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json, '{name}': expected an object; found {rope!r:.80}")
    for key in _ROPE_NUMBERS:
        value = rope.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < FARTHEST
        if value is not None and not number:
            raise ConfigError(f"config.json, '{name}', '{key}': expected a number; found {value!r:.40}")
    return dict(rope)


def _rope(fields: ConfigReader) -> tuple[float, dict[str, Any] | None]:
    """Read theta and scaling from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before 5)."""
    config = fields.config
    # As in transformers, the older field takes precedence.
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta")} | _numbers(config.get(name) or {}, name)
    _numbers(rope, "rope_theta")
    if nested := [kind for kind, value in rope.items() if isinstance(value, Mapping)]:
        raise ConfigError(
            "config.json, 'rope_parameters': expected one set of parameters for all layers; found one for each kind of "
            f"layer ({', '.join(nested)})"
        )
    theta = 10000.0 if rope["rope_theta"] is None else float(rope["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ConfigError(
            "config.json, 'partial_rotary_factor': expected 1.0; only rotation of whole heads is supported"
        )
    if kind == "default":
        return theta, None
    longest = fields.whole("max_position_embeddings", 8192, FARTHEST)
    original = rope.get("original_max_position_embeddings") or longest
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise ConfigError(
            f"config.json, rope scaling: {kind!r} is not supported; supported are linear, dynamic, llama3 and yarn"
        )
    factor = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = longest / original
    if factor is None:
        raise ConfigError(f"config.json, '{name}', 'factor': expected a number; found none")
    options: dict[str, Any] = {"kind": kind, "factor": float(factor)}
    # For dynamic scaling, transformers ignores the original context and scales beyond this length.
    options["original_max_positions"] = longest if kind == "dynamic" else original
    if kind == "llama3":
        options |= {n: float(rope[n]) for n in ("low_freq_factor", "high_freq_factor") if rope.get(n) is not None}
    if kind == "yarn":
        options |= {n: float(rope[n]) for n in ("beta_fast", "beta_slow") if rope.get(n)}
        options |= {"truncate": rope.get("truncate", True), "attention_factor": _attention_factor(rope, factor)}
    return theta, RopeScaling.from_dict(options).to_dict()


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """Return yarn's attention factor (Peng et al., 2023, equation 22), with DeepSeek's two multipliers if given."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(above) / scale(below) if above and below else scale(1.0)


def block_names(config: NetworkConfig, prefix: str) -> dict[str, str]:
    """Map our parameter names to the checkpoint's for every block; `prefix` precedes `layers` in the latter."""
    names = {}
    for i in range(config.num_layers):
        ours, theirs = f"network.blocks.{i}", f"{prefix}layers.{i}"
        names[f"{ours}.attention_norm.weight"] = f"{theirs}.input_layernorm.weight"
        names[f"{ours}.ffn_norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
        for part in ("q_proj", "k_proj", "v_proj"):
            for kind in PARTS if config.attention_bias else PARTS[:1]:
                names[f"{ours}.attention.{part}.{kind}"] = f"{theirs}.self_attn.{part}.{kind}"
        for kind in PARTS if config.attention_output_bias else PARTS[:1]:
            names[f"{ours}.attention.out_proj.{kind}"] = f"{theirs}.self_attn.o_proj.{kind}"
        for part in ("q_norm", "k_norm") if config.qk_norm else ():
            names[f"{ours}.attention.{part}.weight"] = f"{theirs}.self_attn.{part}.weight"
        for part in ("gate", "up", "down"):
            for kind in PARTS if config.ffn_bias else PARTS[:1]:
                names[f"{ours}.ffn.{part}.{kind}"] = f"{theirs}.mlp.{part}_proj.{kind}"
    return names

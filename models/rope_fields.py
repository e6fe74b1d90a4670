"""Read the rotary parameters of a config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .config import ConfigError, RopeScaling
from .config_reader import FARTHEST, ConfigReader

__all__ = ["rope_options"]

_ROPE_NUMBERS = (
    *("rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings", "low_freq_factor"),
    *("high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
)
_KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


def rope_options(fields: ConfigReader) -> dict[str, Any]:
    """Return the options of `NetworkConfig` for theta, scaling and partial rotation.

    They are read from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before 5).

    Raises:
        ConfigError: if a field has an invalid value.
    """
    config, family = fields.config, fields.family
    if family.sliding_theta is not None:
        return _by_layer(fields)
    # As in transformers, the older field takes precedence.
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta")} | _numbers(config.get(name) or {}, name)
    _numbers(rope, "rope_theta")
    if nested := [kind for kind, value in rope.items() if isinstance(value, Mapping)]:
        raise ConfigError(
            "config.json, 'rope_parameters': expected one set of parameters for all layers; found one for each kind of "
            f"layer ({', '.join(nested)})"
        )
    theta = family.rope_theta if rope["rope_theta"] is None else float(rope["rope_theta"])
    return {
        "rope_theta": theta,
        "rope_scaling": _scaling(fields, rope, name),
        "rotary_size": _rotary_size(fields, rope),
    }


def _by_layer(fields: ConfigReader) -> dict[str, Any]:
    """Read one set of parameters for layers with a sliding window, and one for the others."""
    config, family = fields.config, fields.family
    given = _numbers(config.get("rope_parameters") or {}, "rope_parameters")
    kinds = ("full_attention", "sliding_attention")
    if unknown := [key for key, value in given.items() if key not in kinds or not isinstance(value, Mapping | None)]:
        raise ConfigError(
            "config.json, 'rope_parameters': expected one set of parameters for 'full_attention' and one for "
            f"'sliding_attention'; found {unknown[0]!r}"
        )
    full, sliding = (_numbers(given.get(kind) or {}, f"rope_parameters', '{kind}") for kind in kinds)
    older = _numbers(config.get("rope_scaling") or {}, "rope_scaling")
    if "rope_type" not in older and "type" in older:
        # Versions of transformers differ in whether they read it.
        raise ConfigError("config.json, 'rope_scaling': expected 'rope_type' for this family; found 'type'")
    full |= older
    if sliding.get("rope_type", sliding.get("type", "default")) != "default":
        raise ConfigError(
            "config.json, 'rope_parameters', 'sliding_attention': expected the type 'default'; found "
            f"{sliding.get('rope_type', sliding.get('type'))!r:.40}"
        )
    for rope in (full, sliding):
        _rotary_size(fields, rope)
    local = None if family.sliding_theta_field is None else config.get(family.sliding_theta_field)
    if (
        family.sliding_theta_field is None
        and config.get("rope_theta") is not None
        and sliding.get("rope_theta") is None
    ):
        # Versions of transformers differ in whether it is the theta of all layers.
        local = fields.number("rope_theta", None)
        if local != family.rope_theta:
            raise ConfigError(
                f"config.json, 'rope_theta': expected {family.rope_theta} or 'rope_parameters' with one theta for each "
                f"kind of layer; found {local}"
            )
    thetas = {}
    for name, rope, outside, default in (
        ("rope_theta", full, config.get("rope_theta"), family.rope_theta),
        ("sliding_rope_theta", sliding, local, family.sliding_theta),
    ):
        value = rope.get("rope_theta")
        value = outside if value is None else value
        _numbers({"rope_theta": value}, name)
        thetas[name] = default if value is None else float(value)
    return {**thetas, "rope_scaling": _scaling(fields, full, "rope_parameters")}


def _rotary_size(fields: ConfigReader, rope: Mapping[str, Any]) -> int | None:
    """Return the number of rotated features of each head; None for all."""
    default = fields.family.partial_rotary
    share = rope.get("partial_rotary_factor")
    if default is None:
        if share not in (None, 1.0):
            raise ConfigError("config.json, 'partial_rotary_factor': expected 1.0; this family rotates whole heads")
        return None
    share = fields.number("partial_rotary_factor", default) if share is None else share
    heads = fields.whole("num_attention_heads")
    size = fields.whole("head_dim", fields.family.head_dim or fields.whole("hidden_size") // heads)
    if not 0 < share <= 1 or int(size * share) < 2:
        raise ConfigError(
            f"config.json, 'partial_rotary_factor': expected a number above 0 and at most 1, of which heads of {size} "
            f"features have at least two; found {share!r:.40}"
        )
    return int(size * share)


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


def _scaling(fields: ConfigReader, rope: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return the options of `RopeScaling`; `name` is the field that the parameters are from."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if fields.family.name == "Phi3" and kind in ("su", "yarn"):
        # As in transformers: older configs of Phi-3 have these names.
        kind = "longrope"
    if kind == "default":
        return None
    longest = fields.whole("max_position_embeddings", 8192, FARTHEST)
    original = rope.get("original_max_position_embeddings") or longest
    if fields.config.get("original_max_position_embeddings") is not None and kind != "linear":
        original = fields.whole("original_max_position_embeddings", None, FARTHEST)
    elif fields.family.name == "Phi3":
        original = 4096
    if kind not in _KINDS:
        raise ConfigError(f"config.json, rope scaling: {kind!r} is not supported; supported are {', '.join(_KINDS)}")
    factor = rope.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
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
    if kind == "longrope":
        options |= _longrope(rope, name, float(factor), original)
    scaling: RopeScaling = RopeScaling.from_dict(options)
    return scaling.to_dict()


def _longrope(rope: Mapping[str, Any], name: str, factor: float, original: int) -> dict[str, Any]:
    """Return the options of longrope; its attention factor is sqrt(1 + ln factor / ln original) unless given."""
    options: dict[str, Any] = {"factor": max(factor, 1.0)}
    for key in ("short_factor", "long_factor"):
        values = rope.get(key)
        if not isinstance(values, list) or not all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < FARTHEST for x in values
        ):
            raise ConfigError(f"config.json, '{name}', '{key}': expected a list of numbers; found {values!r:.80}")
        options[f"{key}s"] = [float(x) for x in values]
    given = rope.get("attention_factor")
    if given is None:
        given = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return options | {"attention_factor": float(given)}


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """Return yarn's attention factor (Peng et al., 2023, equation 22), with DeepSeek's two multipliers if given."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(above) / scale(below) if above and below else scale(1.0)

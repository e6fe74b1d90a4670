"""Read the backbone from a config.json of transformers: its options, and the names of its blocks' tensors."""

from __future__ import annotations

import math
from typing import Any

from .config import ConfigError, NetworkConfig
from .config_reader import FARTHEST, ConfigReader
from .families import Family
from .fields import activation
from .head import PARTS
from .parts import Part, groups, halves, plus, rows, times
from .rope_fields import rope_options

__all__ = ["backbone_options", "block_tensors", "logit_options"]


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
    bias = family.bias_field is not None and fields.flag(family.bias_field, family.bias_default)
    window, sliding = _sliding(fields, layers)
    # If the field is missing, the family's default applies; null means as many as there are heads.
    kv_heads = heads if "num_key_value_heads" in config else family.num_key_value_heads or heads
    scale = math.sqrt(hidden) if family.scaled_embeddings else 1.0
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
        "attention_output_bias": bias and family.output_bias,
        "ffn_bias": family.reads_mlp_bias and fields.flag("mlp_bias", False),
        "ffn_activation": activation(config),
        "norm": family.norm,
        "norm_place": family.norm_place,
        "norm_epsilon": config.get(family.epsilon_field, family.epsilon),
        "final_norm": family.norm,
        "final_norm_epsilon": config.get(family.epsilon_field, family.epsilon),
        "qk_norm": family.qk_norm is not None,
        "qk_norm_over": family.qk_norm or "head",
        "attention_cap": _cap(fields, "attn_logit_softcapping"),
        "embedding_scale": scale * _multiplier(fields, "embedding_multiplier"),
        "sliding_window": window,
        "sliding_layers": sliding,
        "unrotated_layers": _unrotated(fields, layers),
        **rope_options(fields),
        **_experts(fields, layers),
    }


def _experts(fields: ConfigReader, layers: int) -> dict[str, Any]:
    """Return the options for experts; none if the family has none."""
    family, config = fields.family, fields.config
    if not family.num_experts:
        return {}
    # Versions of transformers differ in the name.
    name = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    options = {
        "num_experts": fields.whole(name, family.num_experts),
        "experts_per_token": fields.whole("num_experts_per_tok", family.experts_per_token),
    }
    if family.name == "Mixtral":
        return options
    step, dense = fields.whole("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise ConfigError(f"config.json, 'mlp_only_layers': expected a list of layers; found {dense!r:.80}")
    return options | {
        "expert_inner": fields.whole("moe_intermediate_size", 768),
        "normalize_experts": fields.flag("norm_topk_prob", False),
        "dense_layers": [i for i in range(layers) if i in dense or (i + 1) % step],
    }


def logit_options(fields: ConfigReader) -> dict[str, Any]:
    """Return the options of `LanguageModelConfig` for the logits of the vocabulary head.

    Raises:
        ConfigError: if a field has an invalid value.
    """
    return {
        "logit_scale": 1 / _multiplier(fields, "logits_scaling"),
        "logit_cap": _cap(fields, "final_logit_softcapping"),
    }


def _multiplier(fields: ConfigReader, name: str) -> float:
    """Return one of Granite's multipliers; 1 for other families."""
    return fields.number(name, 1.0) if fields.family.multipliers else 1.0


def _cap(fields: ConfigReader, name: str) -> float | None:
    """Return the limit of logits; None if the family has none, or the field is null."""
    caps = fields.family.caps
    value = fields.config.get(name, caps.get(name)) if name in caps else None
    return None if value is None else fields.number(name, value)


def _unrotated(fields: ConfigReader, layers: int) -> list[int] | None:
    """Return the layers without rotation: those whose entry in `no_rope_layers` is 0."""
    every = fields.family.unrotated_every
    if not every:
        return None
    listed = fields.config.get("no_rope_layers")
    if listed is None:
        interval = fields.whole("no_rope_layer_interval", every)
        return [i for i in range(layers) if (i + 1) % interval == 0]
    if not isinstance(listed, list) or len(listed) < layers or not all(entry in (0, 1) for entry in listed):
        raise ConfigError(
            f"config.json, 'no_rope_layers': expected 0 or 1 for each of {layers} layers; found {listed!r:.80}"
        )
    return [i for i in range(layers) if listed[i] == 0]


def _sliding(fields: ConfigReader, layers: int) -> tuple[int | None, list[int] | None]:
    """Return the sliding window, and the layers that have it (None: all)."""
    config, family = fields.config, fields.family
    kind = family.sliding_window
    # The classes have a default; a config written by them has null if there is no window.
    has_window = kind in ("always", "layers") or (kind != "never" and fields.flag("use_sliding_window", False))
    window = config.get("sliding_window", family.window) if has_window else None
    window = None if window is None else fields.whole("sliding_window", window, FARTHEST)
    layer_types = config.get("layer_types") if family.reads_layer_types else None
    if layer_types is None:
        if kind == "layers":
            every = family.full_every
            if family.pattern_field is not None:
                every = fields.whole(family.pattern_field, every)
            layer_types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
        elif window is None or kind != "optional":
            return window, None
        elif family.unrotated_every:
            return window, _unrotated(fields, layers)
        else:
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
        expected = "'use_sliding_window' true and" if kind == "optional" else "a number as"
        raise ConfigError(
            f"config.json, 'layer_types': layer {sliding[0]} is 'sliding_attention', but there is no window: expected "
            f"{expected} 'sliding_window'"
        )
    return (window, sliding) if sliding else (None, None)


def block_tensors(fields: ConfigReader, config: NetworkConfig, prefix: str) -> tuple[dict[str, str], dict[str, Part]]:
    """Map our parameter names of every block to the checkpoint's; `prefix` precedes `layers` in the latter.

    Returns:
        The names, and for parameters that are not stored as they are, how they are made.
    """
    names, parts, family = {}, {}, fields.family
    modules = _modules(config)
    made = {module: _part(module, fields, config) for module in modules}
    experts = _expert_modules(config, family)
    for i in range(config.num_layers):
        sparse = bool(experts) and i not in (config.dense_layers or [])
        for module, kinds in modules.items():
            if sparse and module in ("ffn.gate", "ffn.up", "ffn.down"):
                continue
            for kind in kinds:
                ours = f"network.blocks.{i}.{module}.{kind}"
                names[ours] = f"{prefix}layers.{i}.{family.names[module]}.{kind}"
                part = made[module]
                if part.changes:
                    shape = part.shape if kind == "weight" or part.shape is None else part.shape[:1]
                    parts[ours] = Part(shape, part.changes)
        for module, theirs in experts.items() if sparse else ():
            names[f"network.blocks.{i}.{module}.weight"] = f"{prefix}layers.{i}.{theirs}.weight"
    return names, parts


def _expert_modules(config: NetworkConfig, family: Family) -> dict[str, str]:
    """Map our modules of a layer of experts to the checkpoint's; empty if there are none."""
    modules = {"ffn.router": family.names["ffn.router"]} if config.num_experts else {}
    for number in range(config.num_experts or 0):
        for part in ("gate", "up", "down"):
            modules[f"ffn.experts.{number}.{part}"] = family.names[f"ffn.experts.{part}"].format(number)
    return modules


def _modules(config: NetworkConfig) -> dict[str, tuple[str, ...]]:
    """Return the modules of a block with parameters, and which parameters each has."""
    norm = PARTS if config.norm == "layer" else PARTS[:1]
    modules: dict[str, tuple[str, ...]] = {}
    if config.norm_place != "after":
        modules |= {"attention_norm": norm, "ffn_norm": norm}
    if config.norm_place != "before":
        modules |= {"attention_out_norm": norm, "ffn_out_norm": norm}
    for part in ("q_proj", "k_proj", "v_proj"):
        modules[f"attention.{part}"] = PARTS if config.attention_bias else PARTS[:1]
    modules["attention.out_proj"] = PARTS if config.attention_output_bias else PARTS[:1]
    for part in ("q_norm", "k_norm") if config.qk_norm else ():
        modules[f"attention.{part}"] = PARTS[:1]
    for part in ("gate", "up", "down"):
        modules[f"ffn.{part}"] = PARTS if config.ffn_bias else PARTS[:1]
    return modules


def _part(module: str, fields: ConfigReader, config: NetworkConfig) -> Part:
    """Return how a module's parameters are made of the stored tensors."""
    family, part = fields.family, Part()
    size, heads, kv_heads = config.size_of_head, config.num_heads, config.num_kv_heads
    name, group = family.names[module], heads // kv_heads
    if name.endswith("wqkv"):
        part.shape = ((heads + 2 * kv_heads) * size, config.hidden_size)
        start, count = {"q": (0, group), "k": (group, 1), "v": (group + 1, 1)}[module.split(".")[1][0]]
        part.changes.append(groups(kv_heads, group + 2, start, count, size))
    elif name.endswith("qkv_proj"):
        part.shape = ((heads + 2 * kv_heads) * size, config.hidden_size)
        start, count = {"q": (0, heads), "k": (heads, kv_heads), "v": (heads + kv_heads, kv_heads)}[module[10]]
        part.changes.append(rows(start * size, count * size))
    elif name.endswith("gate_up_proj"):
        part.shape = (2 * config.inner_size, config.hidden_size)
        part.changes.append(rows(0 if module == "ffn.gate" else config.inner_size, config.inner_size))
    if family.interleaved and module in ("attention.q_proj", "attention.k_proj"):
        part.changes.append(halves(size, config.size_of_rotation))
    if "norm" in module and family.norm_offset:
        part.changes.append(plus(family.norm_offset))
    scale = _attention_scale(fields, config)
    if scale != 1 and module == ("attention.q_norm" if config.qk_norm else "attention.q_proj"):
        part.changes.append(times(scale))
    residual = _multiplier(fields, "residual_multiplier")
    if residual != 1 and module in ("attention.out_proj", "ffn.down"):
        part.changes.append(times(residual))
    return part


def _attention_scale(fields: ConfigReader, config: NetworkConfig) -> float:
    """Return by what the attention's scale differs from 1 / sqrt(head size); the queries' weights absorb it."""
    if fields.family.multipliers:
        return _multiplier(fields, "attention_multiplier") * math.sqrt(config.size_of_head)
    if fields.family.reads_attention_scale:
        return math.sqrt(config.size_of_head / fields.number("query_pre_attn_scalar", 256))
    return 1.0

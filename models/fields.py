"""Refuse fields of config.json that would turn the same tensors into a different, unsupported model.

Fields that `backbone.py`, `head.py` and `huggingface.py` read are respected; a field that none of these modules
mentions has no effect on inference. The tests compare the effect of every field that transformers' classes read with
transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .config import ConfigError
from .families import FAMILIES

__all__ = ["activation", "check_fields", "normalizes", "remarks"]

_QUANTIZED = "the weights are quantized already; pass the checkpoint as it was before quantization, with --precision"
_NOT_CAUSAL = (
    "tokens would attend to later ones; only causal attention is supported, so that a prompt is computed once for all "
    "candidates"
)
_UNUSED = "this family does not use it"
_ENCODERS = ("bert", "roberta", "xlm-roberta", "modernbert", "deberta", "deberta-v2", "electra", "distilbert")
_ENCODER = (
    ". This one is an encoder, which has no prompt to share: Text Embeddings Inference, Sentence Transformers and "
    "Optimum are made for it"
)
# Matches the last part of a class's path, as named by LLM2Vec and others.
_BIDIRECTIONAL = re.compile(r"([Bb]idirec|Bi(Model|For)|(?<!Cross)Encoder(Model|For))[^.]*$")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Field -> the values that have no effect (None never has any), and why other values are refused.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization_config": ((), _QUANTIZED),
    "compression_config": ((), _QUANTIZED),
    "is_causal": ((True,), _NOT_CAUSAL),
    "use_causal_mask": ((True,), _NOT_CAUSAL),
    "use_bidirectional_attention": ((False,), _NOT_CAUSAL),
    "bidirectional": ((False,), _NOT_CAUSAL),
    "is_encoder_decoder": ((False,), "only decoders are supported"),
    "per_layer_config": (({},), "layers with different configurations are not supported"),
    "transformers_weights": (("model.safetensors",), "the weights are read from model.safetensors or its shards"),
    "partial_rotary_factor": ((1.0,), "this family rotates whole heads"),
    "rope_interleaved": ((False,), "only rotation of the two halves of a head is supported, not of adjacent pairs"),
    "attn_logit_softcapping": ((), _UNUSED),
    "final_logit_softcapping": ((), _UNUSED),
    "query_pre_attn_scalar": ((), _UNUSED),
    "attention_chunk_size": ((), _UNUSED),
    "no_rope_layers": (([],), _UNUSED),
    "clip_qkv": ((), _UNUSED),
    "embedding_multiplier": ((1.0,), _UNUSED),
    "residual_multiplier": ((1.0,), _UNUSED),
    "attention_multiplier": ((), _UNUSED),
    "logits_scaling": ((1.0,), _UNUSED),
    "logit_scale": ((1.0,), _UNUSED),
    "use_parallel_residual": ((False,), _UNUSED),
    "qk_layernorm": ((False,), "a norm of its own for each head is not supported"),
}


def check_fields(config: Mapping[str, Any]) -> None:
    """Refuse a config of an unsupported family, or with a setting that would change the computation.

    Raises:
        ConfigError: with the field, its value and what was expected.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(
            f"config.json, 'model_type': {family!r} is not supported; supported are {', '.join(FAMILIES)}, and models "
            f"that declare one of these types{_of_text(config)}{_ENCODER if family in _ENCODERS else ''}"
        )
    activation(config)
    for name, (neutral, why) in _NEUTRAL.items():
        value = None if name in FAMILIES[family].reads else config.get(name)
        if (value is not None or (name == "is_causal" and name in config)) and value not in neutral:
            expected = " or ".join([*map(_shown, neutral), "no value"])
            raise ConfigError(f"config.json, '{name}': expected {expected}; found {_shown(value):.80}: {why}")
    _check_classes(config)


def _of_text(config: Mapping[str, Any]) -> str:
    """Return what to do about a model of text and images whose language model is of a supported family."""
    inner = config.get("text_config")
    kind = inner.get("model_type") if isinstance(inner, Mapping) else None
    if not isinstance(kind, str) or kind not in FAMILIES:
        return ""
    return f". Its language model is of the type {kind}: save that with its head in a folder of its own, and pass that"


def activation(config: Mapping[str, Any]) -> str:
    """Return the activation of the feed-forward network, by the name in `NetworkConfig`.

    Raises:
        ConfigError: if it is another one.
    """
    family = FAMILIES[config["model_type"]]
    name = config.get(family.activation_field)
    name = family.activation if name is None else name
    known = _ACTIVATIONS | ({"gelu": "gelu_tanh"} if family.name == "Gemma" else {})
    if not isinstance(name, str) or name not in known:
        raise ConfigError(
            f"config.json, '{family.activation_field}': expected {' or '.join(map(repr, known))}; found {name!r:.40}"
        )
    return known[name]


def _shown(value: object) -> str:
    """Format a value as in JSON: true instead of True."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _check_classes(config: Mapping[str, Any]) -> None:
    """Refuse custom classes whose names imply that tokens attend to later ones."""
    code, named = config.get("auto_map"), config.get("architectures")
    classes = [*(named if isinstance(named, list) else []), *(code.values() if isinstance(code, Mapping) else [])]
    for name in classes:
        if isinstance(name, str) and _BIDIRECTIONAL.search(name):
            raise ConfigError(f"config.json: found the class {name}; judging by its name, {_NOT_CAUSAL}")


def remarks(config: Mapping[str, Any]) -> list[str]:
    """Return sentences for the user, one for each setting of a config that is ignored."""
    notes = []
    if isinstance(config.get("auto_map"), Mapping):
        code = ", ".join(sorted({str(value).split(".")[0] for value in config["auto_map"].values()}))
        notes.append(
            f"config.json, 'auto_map': the checkpoint's own Python code ({code}) is not run; the model is read as "
            f"{config.get('model_type')}, and its head is recognized by the names of its tensors"
        )
    settings = config.get("sentence_transformers")
    activation = settings.get("activation_fn") if isinstance(settings, Mapping) else None
    if activation is not None and not str(activation).endswith("Identity"):
        notes.append(
            f"config.json, 'sentence_transformers': the activation {activation} is not applied, which does not change "
            "the order of scores; --activation sigmoid applies a sigmoid"
        )
    switch, spread = ("do_normalize", "var") if "do_normalize" in config else ("normalize_reward", "std")
    applied = config.get(switch) is True and "mean" in config
    if not applied and (config.get("mean"), config.get(spread)) != (None, None):
        notes.append(
            f"config.json, 'mean' and '{spread}' of rewards are not applied, because '{switch}' is not true; this does "
            "not change the order of scores"
        )
    return notes


def normalizes(config: Mapping[str, Any]) -> bool:
    """Whether scores are standardized with the mean and standard deviation of rewards, as in OpenRLHF."""
    return config.get("normalize_reward") is True and "mean" in config

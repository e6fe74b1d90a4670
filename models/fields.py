"""Fields of config.json that would make another model of the same tensors, and are refused unless they change nothing.

What `backbone.py`, `head.py` and `huggingface.py` read is honoured; a field that none of these modules names changes
nothing in inference. The tests compare every field that transformers' classes read with what transformers gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .config import ConfigError
from .families import FAMILIES

__all__ = ["check_fields", "remarks"]

_QUANTIZED = "the weights are quantized already; pass the checkpoint as it was before, and choose --precision"
_BOTH_WAYS = (
    "tokens would attend to those after them; only causal attention is supported, with which a prompt is computed once "
    "for all candidates"
)
_OTHER = "the families that are supported compute without it"
# Of the last part of a class's path: as LLM2Vec and others name them.
_BIDIRECTIONAL = re.compile(r"([Bb]idirec|Bi(Model|For)|(?<!Cross)Encoder(Model|For))[^.]*$")
# Field -> the values with which it changes nothing (None always), and why any other is refused.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization_config": ((), _QUANTIZED),
    "compression_config": ((), _QUANTIZED),
    "is_causal": ((True,), _BOTH_WAYS),
    "use_causal_mask": ((True,), _BOTH_WAYS),
    "use_bidirectional_attention": ((False,), _BOTH_WAYS),
    "bidirectional": ((False,), _BOTH_WAYS),
    "is_encoder_decoder": ((False,), "only decoders are supported"),
    "per_layer_config": (({},), "layers that differ from each other are not supported"),
    "transformers_weights": (("model.safetensors",), "the weights are read from model.safetensors or its shards"),
    "partial_rotary_factor": ((1.0,), "only heads that are rotated whole are supported"),
    "rope_interleaved": ((False,), "halves of a head are rotated, and not neighbours"),
    "attn_logit_softcapping": ((), _OTHER),
    "final_logit_softcapping": ((), _OTHER),
    "query_pre_attn_scalar": ((), _OTHER),
    "attention_chunk_size": ((), _OTHER),
    "no_rope_layers": (([],), _OTHER),
    "clip_qkv": ((), _OTHER),
    "embedding_multiplier": ((1.0,), _OTHER),
    "residual_multiplier": ((1.0,), _OTHER),
    "attention_multiplier": ((), _OTHER),
    "logits_scaling": ((1.0,), _OTHER),
    "logit_scale": ((1.0,), _OTHER),
    "use_parallel_residual": ((False,), _OTHER),
}


def check_fields(config: Mapping[str, Any]) -> None:
    """Refuse a config of another family, and one that asks for other mathematics.

    Raises:
        ConfigError: names the field, its value and what was expected.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(
            f"config.json, 'model_type': {family!r} is not supported; supported are {', '.join(FAMILIES)} and models "
            "that declare themselves as one of them"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"config.json, 'hidden_act': expected 'silu'; found {config['hidden_act']!r}")
    for name, (neutral, why) in _NEUTRAL.items():
        value = config.get(name)
        if value is not None and value not in neutral:
            expected = " or ".join([*map(_shown, neutral), "no such field"])
            raise ConfigError(f"config.json, '{name}': expected {expected}; found {_shown(value):.80}: {why}")
    _check_classes(config)


def _shown(value: object) -> str:
    """As the file has it: true, and not True."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _check_classes(config: Mapping[str, Any]) -> None:
    """Refuse classes of a checkpoint's own whose names say that tokens attend to later ones."""
    code, named = config.get("auto_map"), config.get("architectures")
    classes = [*(named if isinstance(named, list) else []), *(code.values() if isinstance(code, Mapping) else [])]
    for name in classes:
        if isinstance(name, str) and _BIDIRECTIONAL.search(name):
            raise ConfigError(f"config.json: found the class {name}; by its name {_BOTH_WAYS}")


def remarks(config: Mapping[str, Any]) -> list[str]:
    """What a config says that is not followed, each a sentence for people."""
    notes = []
    if isinstance(config.get("auto_map"), Mapping):
        code = ", ".join(sorted({str(value).split(".")[0] for value in config["auto_map"].values()}))
        notes.append(
            f"config.json, 'auto_map': the checkpoint's own Python code ({code}) is not run; the model is read as "
            f"{config.get('model_type')}, its head by the names of the tensors"
        )
    settings = config.get("sentence_transformers")
    activation = settings.get("activation_fn") if isinstance(settings, Mapping) else None
    if activation is not None and not str(activation).endswith("Identity"):
        notes.append(
            f"config.json, 'sentence_transformers': the activation {activation} is not applied; scores keep "
            "their order without it (--activation sigmoid applies that one)"
        )
    if not normalizes(config) and (config.get("mean"), config.get("std")) != (None, None):
        notes.append(
            "config.json, 'mean' and 'std' of rewards are not applied, since 'normalize_reward' is not true; scores "
            "keep their order without them"
        )
    return notes


def normalizes(config: Mapping[str, Any]) -> bool:
    """Whether scores are less the mean of rewards and divided by their deviation, as OpenRLHF does it."""
    return config.get("normalize_reward") is True and "mean" in config

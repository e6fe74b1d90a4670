"""Checkpoints as transformers writes them: the one place where their configs and tensor names become ours.

Families are Llama, Mistral, Qwen2, Qwen3 and what declares itself as one of them. The head is told by its tensors:

=================================  ========================================  =====================
tensors                            who writes them                           scorer
=================================  ========================================  =====================
score.weight [score.bias]          *ForSequenceClassification,               linear
                                   *ForTokenClassification
score.0.*, score.2.*               Qwen2ForRewardModel,                      Linear, ReLU, Linear
                                   Qwen2ForProcessRewardModel
v_head.summary.* or v_head.*       a causal model with a value head          linear, sigmoid
none                               *ForCausalLM that answers at a step tag   two rows of lm_head
=================================  ========================================  =====================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import ConfigError, LanguageModelConfig, NetworkConfig, RopeScaling

__all__ = ["FAMILIES", "Translation", "is_huggingface", "translate"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Translation:
    """What a checkpoint is in our terms.

    Attributes:
        config: of the model.
        names: our parameter name -> the checkpoint's.
        label_rows: tokens whose rows of the vocabulary head are the scorer's weights, or None.
        new_scorer: whether the checkpoint has no scorer and the model starts with a fresh one.
        scoring: fields of the artifact's scoring rule.
        steps: how a step ends in text: `step_text` and `step_split`.
        limits: fields of the artifact's limits.
    """

    config: LanguageModelConfig
    names: dict[str, str]
    label_rows: tuple[int, ...] | None
    new_scorer: bool
    scoring: dict[str, Any]
    steps: dict[str, str]
    limits: dict[str, Any]


def is_huggingface(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of transformers'."""
    return "model_type" in config or "architectures" in config


def translate(
    config: Mapping[str, Any],
    shapes: Shapes,
    *,
    label_tokens: tuple[int, ...] | None = None,
    new_scorer: bool = False,
) -> Translation:
    """Read a config.json beside the shapes of its tensors.

    Args:
        config: the parsed config.json.
        shapes: of every tensor, by its name.
        label_tokens: for a language model that answers at a step tag: the tokens whose logits are the labels.
        new_scorer: give a language model without a scorer a fresh one, to be trained.

    Raises:
        ConfigError: what is not supported, or which field contradicts the weights.
    """
    fields = _Fields(config)
    prefix = _prefix(shapes)
    network = _network(fields)
    head = _head(fields, shapes, label_tokens, new_scorer)
    network |= head.options
    tied, vocabulary = fields.flag("tie_word_embeddings", False), fields.whole("vocab_size")
    generates = label_tokens is None and (head.causal or "lm_head.weight" in shapes)
    model = LanguageModelConfig(
        network=NetworkConfig.from_dict(network),
        vocab_size=vocabulary,
        tie_embeddings=tied or not generates,
        vocabulary_head=generates,
    )
    if label_tokens is not None and (outside := [t for t in label_tokens if not 0 <= t < vocabulary]):
        raise ConfigError(f"label tokens: {outside[0]} is outside the vocabulary (0 to {vocabulary - 1})")
    names = {
        "embedding.weight": f"{prefix}embed_tokens.weight",
        "network.final_norm.weight": f"{prefix}norm.weight",
        **_block_names(model.network, prefix),
        **head.names,
    }
    if generates and not tied:
        names["head.weight"] = "lm_head.weight"
    if label_tokens is not None:
        names["network.scorer.dense2.weight"] = f"{prefix}embed_tokens.weight" if tied else "lm_head.weight"
    _check_extra(shapes, set(names.values()), prefix)
    pad = fields.config.get("pad_token_id")
    scoring = head.scoring | {"pad_token": pad or 0, "stop_tokens": _stops(config)}
    # Where a text may end with its pad token (pad = eos), these read the token before: they were trained so.
    scoring["passes_pad"] = pad is not None and _architecture(fields).endswith("ForSequenceClassification")
    limits = {"max_tokens": fields.whole("max_position_embeddings", 8192)}
    is_new = not head.names and label_tokens is None
    return Translation(model, names, label_tokens, is_new, scoring, head.steps, limits)


class _Fields:
    """A config.json, whose errors name the field."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.family = config.get("model_type")
        if self.family not in FAMILIES:
            raise ConfigError(
                f"config.json, 'model_type': {self.family!r} is not supported; supported are {', '.join(FAMILIES)} and "
                "models that declare themselves as one of them"
            )
        if config.get("quantization_config") is not None:
            raise ConfigError(
                "config.json, 'quantization_config': the weights are quantized already; pass the checkpoint as it was "
                "before, and choose --precision"
            )
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ConfigError(f"config.json, 'hidden_act': expected 'silu'; found {config['hidden_act']!r}")

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"config.json, '{name}': expected a whole number of at least 1; found {value!r}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ConfigError(f"config.json, '{name}': expected true or false; found {value!r}")
        return value


def _prefix(shapes: Shapes) -> str:
    """What stands before `embed_tokens.weight` in every name of the backbone."""
    ending = "embed_tokens.weight"
    found = [name.removesuffix(ending) for name in shapes if name.endswith(ending)]
    if len(found) != 1:
        raise ConfigError(f"the weights have {len(found)} tensors named '{ending}'; expected one")
    return found[0]


def _network(fields: _Fields) -> dict[str, Any]:
    """Options of the backbone."""
    config, family = fields.config, fields.family
    hidden, heads, layers = (fields.whole(f) for f in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    if config.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"config.json: 'hidden_size' {hidden} is no multiple of 'num_attention_heads' {heads}")
    default_head = 128 if family == "qwen3" else hidden // heads
    bias = fields.flag("attention_bias", False) if family in ("llama", "qwen3") else False
    window, sliding = _sliding(fields, layers)
    theta, scaling = _rope(fields)
    return {
        "embed_dim": hidden,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.whole("num_key_value_heads", 8 if family == "mistral" else heads),
        "head_dim": fields.whole("head_dim", default_head),
        "ffn_inner": fields.whole("intermediate_size"),
        "dropout": 0.0,
        "attention_bias": bias or family == "qwen2",
        "attention_output_bias": bias,
        "ffn_bias": family == "llama" and fields.flag("mlp_bias", False),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "final_norm": "rms",
        "final_norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "qk_norm": family == "qwen3",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": window,
        "sliding_layers": sliding,
    }


def _sliding(fields: _Fields, layers: int) -> tuple[int | None, list[int] | None]:
    """The window, and the layers that have it (None: all)."""
    config = fields.config
    if fields.family == "mistral":
        # The class's own default is 4096; a config that was written by it says null where there is none.
        return config.get("sliding_window", 4096), None
    if fields.family == "llama" or not fields.flag("use_sliding_window", False):
        return None, None
    window = config.get("sliding_window", 4096)
    if window is None:
        return None, None
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"config.json, 'layer_types': expected 'full_attention' or 'sliding_attention' for each of {layers} "
            f"layers; found {kinds!r:.200}"
        )
    sliding = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    return (window, sliding) if sliding else (None, None)


def _rope(fields: _Fields) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    config = fields.config
    rope = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    rope |= config.get("rope_parameters") or {}
    theta = rope["rope_theta"]
    theta = 10000.0 if theta is None else float(theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError("config.json, 'partial_rotary_factor': only heads that are rotated whole are supported")
    if kind == "default":
        return theta, None
    longest = fields.whole("max_position_embeddings", 8192)
    original = rope.get("original_max_position_embeddings") or longest
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise ConfigError(
            f"config.json, rope scaling: {kind!r} is not supported; supported are linear, dynamic, llama3 and yarn"
        )
    factor = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = longest / original
    if not isinstance(factor, int | float):
        raise ConfigError(f"config.json, rope scaling, 'factor': expected a number; found {factor!r}")
    options: dict[str, Any] = {"kind": kind, "factor": float(factor)}
    # transformers stretches from here in dynamic scaling, whatever is said of an original context.
    options["original_max_positions"] = longest if kind == "dynamic" else original
    if kind == "llama3":
        options |= {n: float(rope[n]) for n in ("low_freq_factor", "high_freq_factor") if n in rope}
    if kind == "yarn":
        options |= {n: float(rope[n]) for n in ("beta_fast", "beta_slow") if rope.get(n)}
        options |= {"truncate": rope.get("truncate", True), "attention_factor": _attention_factor(rope, factor)}
    return theta, RopeScaling.from_dict(options).to_dict()


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """Of yarn (Peng et al., 2023, equation 22), with DeepSeek's two multipliers where they are given."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(above) / scale(below) if above and below else scale(1.0)


@dataclass(frozen=True)
class _Head:
    options: dict[str, Any]
    names: dict[str, str]
    scoring: dict[str, Any]
    causal: bool
    steps: dict[str, str] = field(default_factory=dict)


def _head(fields: _Fields, shapes: Shapes, label_tokens: tuple[int, ...] | None, new_scorer: bool) -> _Head:
    architecture = _architecture(fields)
    if label_tokens is not None:
        options = {"scorer_kind": "linear", "scorer_bias": False, "num_labels": len(label_tokens)}
        return _Head(options, {}, {"activation": "softmax", "aggregation": "step_last"}, causal=True)
    if "score.0.weight" in shapes and "score.2.weight" in shapes:
        labels = _labels(fields, shapes["score.2.weight"][0])
        options = {"scorer_kind": "mlp", "scorer_activation": "relu", "scorer_hidden": shapes["score.0.weight"][0]}
        names = {f"network.scorer.dense{i}.{p}": f"score.{n}.{p}" for i, n in ((1, 0), (2, 2)) for p in _PARTS}
        stepwise = architecture.endswith("ForProcessRewardModel")
        # As its authors do: steps are divided by blank lines, and each ends with a token of its own.
        steps = {"step_text": "<extra_0>", "step_split": "\n\n"} if stepwise else {}
        return _Head({**options, "num_labels": len(labels)}, names, _rule(labels, stepwise), False, steps)
    for name, causal in (("score", False), ("v_head.summary", True), ("v_head", True)):
        if f"{name}.weight" in shapes:
            labels, bias = _labels(fields, shapes[f"{name}.weight"][0], causal), f"{name}.bias" in shapes
            options = {"scorer_kind": "linear", "scorer_bias": bias, "num_labels": len(labels)}
            names = {f"network.scorer.dense2.{p}": f"{name}.{p}" for p in (_PARTS if bias else _PARTS[:1])}
            stepwise = architecture.endswith("ForTokenClassification") or causal
            scoring = _rule(labels, stepwise) | ({"activation": "sigmoid"} if causal else {})
            return _Head(options, names, scoring, causal, {"step_text": "\n"} if stepwise else {})
    if new_scorer:
        return _Head({}, {}, {"activation": "sigmoid"}, causal=True)
    what = f"'architectures' says {architecture}" if architecture else "'architectures' is not given"
    raise ConfigError(
        f"the checkpoint has no scorer (config.json, {what}): none of the tensors score.weight, score.0.weight, "
        "v_head.summary.weight is there. A language model that answers at a step tag needs --label-tokens; for another "
        "train a scorer first, see docs/scorer.md"
    )


def _architecture(fields: _Fields) -> str:
    return str((fields.config.get("architectures") or [""])[0])


_PARTS = ("weight", "bias")


def _labels(fields: _Fields, count: int, single: bool = False) -> list[str]:
    """Names of the labels, in order."""
    named = None if single else fields.config.get("id2label")
    if named is None:
        return [f"LABEL_{i}" for i in range(count)]
    if not isinstance(named, dict) or {str(i) for i in range(count)} != {str(key) for key in named}:
        raise ConfigError(
            f"config.json, 'id2label': it names {len(named)} labels; the weights of the head have {count}: "
            "one of the two is of another model"
        )
    return [str({str(key): name for key, name in named.items()}[str(i)]) for i in range(count)]


def _rule(labels: list[str], stepwise: bool) -> dict[str, Any]:
    """The usual reading: one label as it is; of two the second's probability; of more none is more likely meant."""
    rule: dict[str, Any] = {"labels": labels, "aggregation": "step_last" if stepwise else "last"}
    if len(labels) == 2:
        rule |= {"activation": "softmax", "label": 1}
    return rule


def _block_names(config: NetworkConfig, prefix: str) -> dict[str, str]:
    names = {}
    for i in range(config.num_layers):
        ours, theirs = f"network.blocks.{i}", f"{prefix}layers.{i}"
        names[f"{ours}.attention_norm.weight"] = f"{theirs}.input_layernorm.weight"
        names[f"{ours}.ffn_norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
        for part in ("q_proj", "k_proj", "v_proj"):
            for kind in _PARTS if config.attention_bias else _PARTS[:1]:
                names[f"{ours}.attention.{part}.{kind}"] = f"{theirs}.self_attn.{part}.{kind}"
        for kind in _PARTS if config.attention_output_bias else _PARTS[:1]:
            names[f"{ours}.attention.out_proj.{kind}"] = f"{theirs}.self_attn.o_proj.{kind}"
        for part in ("q_norm", "k_norm") if config.qk_norm else ():
            names[f"{ours}.attention.{part}.weight"] = f"{theirs}.self_attn.{part}.weight"
        for part in ("gate", "up", "down"):
            for kind in _PARTS if config.ffn_bias else _PARTS[:1]:
                names[f"{ours}.ffn.{part}.{kind}"] = f"{theirs}.mlp.{part}_proj.{kind}"
    return names


def _check_extra(shapes: Shapes, used: set[str], prefix: str) -> None:
    """Refuse tensors that nothing reads: the config would describe another model."""
    # Old buffers, and a head that is tied or that a classifier was cut from.
    harmless = ("rotary_emb.inv_freq",)
    extra = [n for n in shapes if n not in used and not n.endswith(harmless) and n != "lm_head.weight"]
    if extra:
        raise ConfigError(
            f"the weights have {len(extra)} tensors that a model of this config has no place for, '{sorted(extra)[0]}' "
            "first; the config is of another model, or the architecture is not supported"
        )


def _stops(config: Mapping[str, Any]) -> list[int]:
    found = config.get("eos_token_id")
    found = found if isinstance(found, list) else [found]
    return [token for token in found if isinstance(token, int)]

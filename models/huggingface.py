"""Checkpoints as transformers writes them: the one place where their configs and tensor names become ours.

Families are Llama, Mistral, Qwen2, Qwen3 and what declares itself as one of them. `fields.py` refuses what would change
the mathematics, `head.py` reads the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .adapters import check_adapter_names
from .config import ConfigError, LanguageModelConfig, NetworkConfig, RopeScaling
from .fields import FAMILIES, check_fields, remarks
from .head import PARTS, Shapes, architecture, read_head

__all__ = ["FAMILIES", "Translation", "is_huggingface", "translate"]

# What no size and no position of a model comes near; beyond them numbers would overflow before they are refused.
_LARGEST, _FARTHEST = 2**20, 2**31 - 1
_ROPE_NUMBERS = (
    *("rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings", "low_freq_factor"),
    *("high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
)
# Parts of names that a module has when it is wrapped while it is saved: by torch.compile, DDP, FSDP, DeepSpeed.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


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
        normal: mean and standard deviation of rewards that scores are normalized by, or None.
        remarks: what the config says that is not followed.
    """

    config: LanguageModelConfig
    names: dict[str, str]
    label_rows: tuple[int, ...] | None
    new_scorer: bool
    scoring: dict[str, Any]
    steps: dict[str, str]
    limits: dict[str, Any]
    normal: tuple[float, float] | None
    remarks: list[str]


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
    check_fields(config)
    check_adapter_names(shapes)
    shapes, stored = _unwrapped(shapes)
    fields = _Fields(config)
    prefix = _prefix(shapes)
    network = _network(fields, len(shapes))
    head = read_head(config, shapes, _further(shapes, prefix), label_tokens, new_scorer)
    network |= head.options
    tied, vocabulary = fields.flag("tie_word_embeddings", False), fields.whole("vocab_size", most=2**24)
    causal = tied and architecture(config).endswith("ForCausalLM")
    generates = label_tokens is None and (new_scorer or causal or "lm_head.weight" in shapes)
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
    _check_extra(shapes, set(names.values()), _further(shapes, prefix), label_tokens is not None)
    pad = _token(config, "pad_token_id", vocabulary)
    scoring = head.scoring | {"pad_token": pad or 0, "stop_tokens": _stops(config, vocabulary)}
    # Where a text may end with its pad token (pad = eos), these read the token before: they were trained so.
    scoring["passes_pad"] = pad is not None and architecture(config).endswith("ForSequenceClassification")
    return Translation(
        config=model,
        names={ours: stored.get(theirs, theirs) for ours, theirs in names.items()},
        label_rows=label_tokens,
        new_scorer=not head.names and label_tokens is None,
        scoring=scoring,
        steps=head.steps,
        limits={"max_tokens": fields.whole("max_position_embeddings", 8192, _FARTHEST)},
        normal=head.normal,
        remarks=remarks(config),
    )


def _unwrapped(shapes: Shapes) -> tuple[Shapes, dict[str, str]]:
    """The tensors by the names that they have without wrappers, and {that name: the one in the file}."""
    stored: dict[str, str] = {}
    for name in shapes:
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in stored:
            raise ConfigError(f"the weights have tensor '{plain}' twice, as '{stored[plain]}' and as '{name}'")
        stored[plain] = name
    return {plain: shapes[name] for plain, name in stored.items()}, stored


def _further(shapes: Shapes, prefix: str) -> list[str]:
    """Tensors beside backbone and vocabulary head, in order of their names."""
    own = (f"{prefix}layers.", f"{prefix}embed_tokens.", f"{prefix}norm.", "lm_head.")
    return sorted(name for name in shapes if not name.startswith(own))


class _Fields:
    """A config.json, whose errors name the field."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.family = config["model_type"]

    def whole(self, name: str, default: int | None = None, most: int = _LARGEST) -> int:
        value = self.config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ConfigError(
                f"config.json, '{name}': expected a whole number of at least 1 and at most {most}; found {value!r:.40}"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ConfigError(f"config.json, '{name}': expected true or false; found {value!r}")
        return value


def _numbers(rope: Any, name: str) -> dict[str, Any]:
    """The parameters of the rotation: an object whose numbers are numbers."""
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config.json, '{name}': expected an object; found {rope!r:.80}")
    for key in _ROPE_NUMBERS:
        value = rope.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _FARTHEST
        if value is not None and not number:
            raise ConfigError(f"config.json, '{name}', '{key}': expected a number; found {value!r:.40}")
    return dict(rope)


def _prefix(shapes: Shapes) -> str:
    """What stands before `embed_tokens.weight` in every name of the backbone."""
    ending = "embed_tokens.weight"
    found = [name.removesuffix(ending) for name in shapes if name.endswith(ending)]
    if len(found) != 1:
        raise ConfigError(f"the weights have {len(found)} tensors named '{ending}'; expected one")
    return found[0]


def _network(fields: _Fields, tensors: int) -> dict[str, Any]:
    """Options of the backbone."""
    config, family = fields.config, fields.family
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    # A layer has tensors, and a number that is far from true is not to be built first.
    layers = fields.whole("num_hidden_layers", most=max(1, tensors))
    if config.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"config.json: 'hidden_size' {hidden} is no multiple of 'num_attention_heads' {heads}")
    default_head = 128 if family == "qwen3" else hidden // heads
    bias = fields.flag("attention_bias", False) if family in ("llama", "qwen3") else False
    window, sliding = _sliding(fields, layers)
    # Where the field is missing; null stands for as many as there are heads.
    kv_heads = 8 if family == "mistral" and "num_key_value_heads" not in config else heads
    theta, scaling = _rope(fields)
    return {
        "embed_dim": hidden,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.whole("num_key_value_heads", kv_heads),
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
    config, mistral = fields.config, fields.family == "mistral"
    # The classes' own default is 4096; a config that was written by them says null where there is none.
    has_window = mistral or (fields.family != "llama" and fields.flag("use_sliding_window", False))
    window = config.get("sliding_window", 4096) if has_window else None
    window = None if window is None else fields.whole("sliding_window", 4096, _FARTHEST)
    kinds = config.get("layer_types")
    if kinds is None:
        if window is None or mistral:
            return window, None
        first = config.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise ConfigError(f"config.json, 'max_window_layers': expected a whole number; found {first!r:.40}")
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
        raise ConfigError(
            f"config.json, 'layer_types': expected 'full_attention' or 'sliding_attention' for each of {layers} "
            f"layers; found {kinds!r:.200}"
        )
    sliding = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
    if sliding and window is None:
        raise ConfigError(
            f"config.json, 'layer_types': layer {sliding[0]} is 'sliding_attention', but there is no window: expected "
            + ("a number as 'sliding_window'" if mistral else "'use_sliding_window' true and 'sliding_window'")
        )
    return (window, sliding) if sliding else (None, None)


def _rope(fields: _Fields) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    config = fields.config
    # As in transformers: where both are given, the older field counts.
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta")} | _numbers(config.get(name) or {}, name)
    _numbers(rope, "rope_theta")
    if nested := [kind for kind, value in rope.items() if isinstance(value, Mapping)]:
        raise ConfigError(
            f"config.json, 'rope_parameters': found parameters for each kind of layer ({', '.join(nested)}); expected "
            "one set for all layers"
        )
    theta = 10000.0 if rope["rope_theta"] is None else float(rope["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ConfigError("config.json, 'partial_rotary_factor': only heads that are rotated whole are supported")
    if kind == "default":
        return theta, None
    longest = fields.whole("max_position_embeddings", 8192, _FARTHEST)
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
    # transformers stretches from here in dynamic scaling, whatever is said of an original context.
    options["original_max_positions"] = longest if kind == "dynamic" else original
    if kind == "llama3":
        options |= {n: float(rope[n]) for n in ("low_freq_factor", "high_freq_factor") if rope.get(n) is not None}
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


def _block_names(config: NetworkConfig, prefix: str) -> dict[str, str]:
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


def _check_extra(shapes: Shapes, used: set[str], further: list[str], label_tokens: bool) -> None:
    """Refuse tensors that nothing reads: the config would describe another model."""
    # Old buffers, and a head that is tied or that a classifier was cut from.
    harmless = ("rotary_emb.inv_freq",)
    extra = {n for n in shapes if n not in used and not n.endswith(harmless) and n != "lm_head.weight"}
    if extra:
        # Those of a head say more than those of the backbone.
        named = [name for name in further if name in extra] or sorted(extra)
        shown = f"{', '.join(f'{name} {shapes[name]}' for name in named[:6])}{', ...' if len(extra) > 6 else ''}"
        if label_tokens and further:
            raise ConfigError(
                f"label tokens were given, but the weights have a scorer too, which would not be read: {shown}; leave "
                "out --label-tokens and --label-token-ids, or take these tensors out of the weights"
            )
        raise ConfigError(
            f"the weights have {len(extra)} tensor{'s' if len(extra) > 1 else ''} that a model of this config has no "
            f"place for: {shown}; the config is of another model, or the architecture is not one of those in "
            "docs/reward_models.md"
        )


def _token(config: Mapping[str, Any], name: str, vocabulary: int) -> int | None:
    """A token's id; None if there is none."""
    token = config.get(name)
    if token is None:
        return None
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
        # The tokens that end a text may come from either file.
        file = "config.json or generation_config.json" if name == "eos_token_id" else "config.json"
        raise ConfigError(
            f"{file}, '{name}': {token!r} is outside the vocabulary (0 to {vocabulary - 1}); write the id of a "
            "token that the model has, or null if it has none"
        )
    return token


def _stops(config: Mapping[str, Any], vocabulary: int) -> list[int]:
    given = config.get("eos_token_id")
    tokens = given if isinstance(given, list) else [] if given is None else [given]
    return [t for token in tokens if (t := _token({"eos_token_id": token}, "eos_token_id", vocabulary)) is not None]

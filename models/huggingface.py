"""Translate configs and tensor names of transformers checkpoints to bonnx's.

`families.py` lists the families, `fields.py` refuses settings that would change the computation, `backbone.py` reads
the blocks and `head.py` the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .adapters import check_adapter_names
from .backbone import backbone_options, block_tensors, logit_options
from .config import ConfigError, LanguageModelConfig, NetworkConfig
from .config_reader import FARTHEST, ConfigReader
from .families import FAMILIES, Family
from .fields import check_fields, remarks
from .gate import gated_head
from .head import Head, LabelTokens, Shapes, architecture, read_head
from .head_file import HeadFile, declared_head
from .parts import Part, plus, times

__all__ = ["Translation", "is_huggingface", "plain_name", "translate"]

# Why the vocabulary head is left out: of a gated head, and of one at an appended token.
_NO_GENERATION = (
    "the gate needs a finished prompt, with the header of the assistant's turn; the vocabulary head is left out",
    "the score is read at a token that is appended to each text, which the graphs that generate cannot do; the "
    "vocabulary head is left out",
)
# Parts that torch.compile, DDP, FSDP and DeepSpeed add to tensor names if a wrapped module is saved.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


@dataclass(frozen=True)
class Translation:
    """A transformers checkpoint in bonnx's terms.

    Attributes:
        config: the model's config.
        names: our parameter name -> the checkpoint's.
        parts: our parameter name -> how it is made of that tensor, where the two are not the same.
        label_tokens: tokens whose rows of the vocabulary head become the scorer's weights, or None.
        new_scorer: whether the checkpoint has no scorer and the model starts with a new one.
        scoring: fields of the artifact's scoring rule.
        head: the head; its names are among `names`.
        limits: fields of the artifact's limits.
        stored: name of a tensor without wrappers -> its name in the file.
        remarks: sentences for the user, one for each setting that is ignored.
    """

    config: LanguageModelConfig
    names: dict[str, str]
    parts: dict[str, Part]
    label_tokens: LabelTokens | None
    new_scorer: bool
    scoring: dict[str, Any]
    head: Head
    limits: dict[str, Any]
    stored: dict[str, str]
    remarks: list[str]


def is_huggingface(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in the format of transformers."""
    return "model_type" in config or "architectures" in config


def translate(
    config: Mapping[str, Any],
    shapes: Shapes,
    *,
    label_tokens: LabelTokens | None = None,
    new_scorer: bool = False,
    no_scorer: bool = False,
    declared: HeadFile | None = None,
) -> Translation:
    """Translate a config.json, given the shapes of the checkpoint's tensors.

    Args:
        config: the parsed config.json.
        shapes: the shape of every tensor, by name.
        label_tokens: for a language model that answers at a step tag, the tokens whose logits are the labels.
        new_scorer: add a new scorer, to be trained, to a language model without one.
        no_scorer: accept a language model without one.
        declared: what the caller says of a head that is not recognized by its tensors.

    Raises:
        ConfigError: if a field or tensor is not supported, or a field contradicts the weights.
    """
    check_fields(config)
    check_adapter_names(shapes)
    shapes, stored = _unwrapped(shapes)
    fields, family = ConfigReader(config), FAMILIES[config["model_type"]]
    network, prefix = backbone_options(fields, len(shapes)), _prefix(shapes, family)
    further = _further(shapes, prefix, family)
    head = None if declared is not None or label_tokens is not None else gated_head(config, shapes)
    if declared is not None:
        head = declared_head(declared, shapes, further, network["hidden_size"])
    head = head or read_head(config, shapes, further, label_tokens, new_scorer, no_scorer)
    tied, vocabulary = fields.flag("tie_word_embeddings", family.tied), fields.whole("vocab_size", most=2**24)
    has_head = f"{family.vocabulary}.weight" in shapes or (tied and architecture(config).endswith("ForCausalLM"))
    generates = label_tokens is None and (new_scorer or has_head)
    notes = remarks(config)
    if generates and (head.appended is not None or head.gate is not None):
        notes.append(f"{_NO_GENERATION[head.gate is None]}, so the artifact scores and does not generate")
        generates = False
    model = LanguageModelConfig(
        network=NetworkConfig.from_dict(network | head.options),
        vocab_size=vocabulary,
        tie_embeddings=tied or not generates,
        vocabulary_head=generates,
        **logit_options(fields),
    )
    names, parts = _tensors(fields, model, head, prefix, label_tokens)
    _check_extra(shapes, {*names.values()}, head.unused, further, family, label_tokens is not None)
    return Translation(
        config=model,
        names={ours: stored.get(theirs, theirs) for ours, theirs in names.items()},
        parts=parts,
        label_tokens=label_tokens,
        new_scorer=new_scorer and not head.names and label_tokens is None,
        scoring=_scoring(config, head, vocabulary),
        head=head,
        limits={"max_tokens": fields.whole("max_position_embeddings", 8192, FARTHEST)},
        stored=stored,
        remarks=notes,
    )


def _scoring(config: Mapping[str, Any], head: Head, vocabulary: int) -> dict[str, Any]:
    """Return the fields of the scoring rule."""
    pad = _token(config, "pad_token_id", vocabulary)
    scoring = head.scoring | {"pad_token": pad or 0, "stop_tokens": _stops(config, vocabulary)}
    # If a text may end with its pad token (pad = eos), these classes read the token before it, as they were trained to.
    scoring["passes_pad"] = pad is not None and architecture(config).endswith("ForSequenceClassification")
    scoring["passes_pad"] &= head.appended is None
    return scoring


def _tensors(
    fields: ConfigReader, model: LanguageModelConfig, head: Head, prefix: str, label_tokens: LabelTokens | None
) -> tuple[dict[str, str], dict[str, Part]]:
    """Map our parameter names to the checkpoint's, and to how they are made where the two are not the same."""
    family = fields.family
    names, parts = block_tensors(fields, model.network, prefix)
    names |= _names(
        model, head, prefix, family, label_tokens is not None, fields.flag("tie_word_embeddings", family.tied)
    )
    if family.norm_offset:
        parts["network.final_norm.weight"] = Part(changes=[plus(family.norm_offset)])
    if label_tokens is None:
        return names, parts
    if outside := [token for token in label_tokens.ids if not 0 <= token < model.vocab_size]:
        raise ConfigError(f"label tokens: {outside[0]} is outside the vocabulary (0 to {model.vocab_size - 1})")
    if model.logit_cap is not None:
        raise ConfigError(
            f"config.json, 'final_logit_softcapping': {model.logit_cap} limits the logits of label tokens, which a "
            "linear scorer cannot; set it to null if the model was trained without"
        )
    if model.logit_scale != 1:
        parts["network.scorer.dense2.weight"] = Part(changes=[times(model.logit_scale)])
    return names, parts


def _names(
    config: LanguageModelConfig, head: Head, prefix: str, family: Family, label_tokens: bool, tied: bool
) -> dict[str, str]:
    """Map our parameter names outside the blocks to the checkpoint's; label tokens use rows of the vocabulary head."""
    embedding, vocabulary = f"{prefix}{family.embedding}.weight", f"{family.vocabulary}.weight"
    names = {"embedding.weight": embedding, "network.final_norm.weight": f"{prefix}norm.weight", **head.names}
    if config.network.final_norm == "layer":
        names["network.final_norm.bias"] = f"{prefix}norm.bias"
    if config.vocabulary_head and not tied:
        names["head.weight"] = vocabulary
    if label_tokens:
        names["network.scorer.dense2.weight"] = embedding if tied else vocabulary
    return names


def plain_name(name: str) -> str:
    """Return a tensor's name without what wrappers of modules, peft's among them, add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS).removeprefix("base_model.model.")


def _unwrapped(shapes: Shapes) -> tuple[Shapes, dict[str, str]]:
    """Return the shapes by names without wrappers, and {name without wrappers: name in the file}."""
    stored: dict[str, str] = {}
    for name in shapes:
        plain = plain_name(name)
        if plain in stored:
            raise ConfigError(f"the weights contain tensor '{plain}' twice, as '{stored[plain]}' and as '{name}'")
        stored[plain] = name
    return {plain: shapes[name] for plain, name in stored.items()}, stored


def _further(shapes: Shapes, prefix: str, family: Family) -> list[str]:
    """Return the sorted names of the tensors that belong neither to the backbone nor to the vocabulary head."""
    known = (f"{prefix}layers.", f"{prefix}{family.embedding}.", f"{prefix}norm.", f"{family.vocabulary}.")
    return sorted(name for name in shapes if not name.startswith(known))


def _prefix(shapes: Shapes, family: Family) -> str:
    """Return the common prefix of the backbone's tensor names."""
    ending = f"{family.embedding}.weight"
    prefixes = [name.removesuffix(ending) for name in shapes if name.endswith(ending)]
    if len(prefixes) != 1:
        raise ConfigError(f"the weights have {len(prefixes)} tensors named '{ending}'; expected one")
    return prefixes[0]


def _check_extra(
    shapes: Shapes,
    used: set[str],
    unused: tuple[str, ...],
    further: list[str],
    family: Family,
    label_tokens: bool,
) -> None:
    """Refuse unused tensors, because they show that the config describes another model; `unused` are known ones."""
    # Unused but harmless: old buffers, and a vocabulary head that is tied or was replaced by a classifier.
    harmless = ("rotary_emb.inv_freq",)
    vocabulary = f"{family.vocabulary}.weight"
    extra = {n for n in shapes if n not in used and not n.endswith(harmless) and n != vocabulary}
    extra = {n for n in extra if not any(n == name or n.startswith(f"{name}.") for name in unused)}
    if extra:
        # A head's tensors are more informative than the backbone's.
        named = [name for name in further if name in extra] or sorted(extra)
        shown = f"{', '.join(f'{name} {shapes[name]}' for name in named[:6])}{', ...' if len(extra) > 6 else ''}"
        if label_tokens and further:
            raise ConfigError(
                f"label tokens were given, but the weights have a scorer too, which would be ignored: {shown}; omit "
                "--label-tokens and --label-token-ids, or remove these tensors from the weights"
            )
        raise ConfigError(
            f"the weights have {len(extra)} tensor{'s' if len(extra) > 1 else ''} that a model with this config does "
            f"not use: {shown}; the config belongs to another model, or the architecture is not one of those listed in "
            "docs/reward_models.md"
        )


def _token(config: Mapping[str, Any], name: str, vocabulary: int) -> int | None:
    """Return a special token's id; None if it is not set."""
    token = config.get(name)
    if token is None:
        return None
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
        # End tokens may come from either file.
        file = "config.json or generation_config.json" if name == "eos_token_id" else "config.json"
        raise ConfigError(
            f"{file}, '{name}': {token!r} is outside the vocabulary (0 to {vocabulary - 1}); set it to the id of a "
            "token in the vocabulary, or to null"
        )
    return token


def _stops(config: Mapping[str, Any], vocabulary: int) -> list[int]:
    ids = config.get("eos_token_id")
    tokens = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return [t for token in tokens if (t := _token({"eos_token_id": token}, "eos_token_id", vocabulary)) is not None]

"""What is exported: a checkpoint's model, the rules that its config states, and what the caller states instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import tokenizers

from bonnx.errors import ExportError, InputError
from bonnx.models.checkpoint import load_checkpoint, read_config
from bonnx.models.config import ConfigError
from bonnx.models.fields import check_fields
from bonnx.models.huggingface import is_huggingface
from bonnx.models.network import LanguageModel, TwoHeadedNetwork
from bonnx.runtime.artifact.manifest import Limits, Scoring, TextRules
from bonnx.runtime.selection.aggregate import is_stepwise

from .tokenizer import TextFiles, check_vocabulary, read_tokenizer
from .tokenizer_check import check_against_transformers

__all__ = ["Checkpoint", "Overrides", "check_scoring", "read_checkpoint"]


class Overrides(NamedTuple):
    """What a caller states; None leaves what the checkpoint says. Named as the options of `bonnx export`."""

    aggregation: str | None = None
    activation: str | None = None
    label: str | None = None
    label_tokens: list[str] | None = None
    label_token_ids: list[int] | None = None
    step_text: str | None = None
    step_split: str | None = None
    max_tokens: int | None = None
    max_candidates: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint.

    Attributes:
        model: float32, in inference mode.
        reload: gives it once more, from the files.
        scoring: how positions become one score.
        text: how text becomes tokens.
        limits: of the runtime.
        tokenizer: None if the folder has none.
        remarks: what the checkpoint says that is not followed, each a sentence for people.
    """

    model: LanguageModel | TwoHeadedNetwork
    reload: Callable[[], LanguageModel | TwoHeadedNetwork]
    scoring: Scoring
    text: TextRules
    limits: Limits
    tokenizer: TextFiles | None
    remarks: list[str]


def read_checkpoint(folder: Path, overrides: Overrides) -> Checkpoint:
    """Read a checkpoint's folder.

    Raises:
        ConfigError: it is no checkpoint, or not one that is supported.
        ExportError: the model cannot be scored by its rule (`check_scoring`).
        InputError: an override does not fit it, or scores are read at the ends of steps and nothing says where.
    """
    config = read_config(folder)
    foreign = is_huggingface(config)
    if foreign:
        # Of all that may be wrong with a checkpoint of another family, this is what helps.
        check_fields(config)
    tokenizer = read_tokenizer(folder)
    label_tokens = _label_tokens(overrides, tokenizer, foreign)

    def reload() -> LanguageModel | TwoHeadedNetwork:
        return load_checkpoint(folder, label_tokens=label_tokens)[0]

    model, metadata = load_checkpoint(folder, label_tokens=label_tokens)
    if tokenizer is not None and isinstance(model, LanguageModel):
        check_vocabulary(tokenizer, model.config.vocab_size)
    text = _text(metadata.get("text", {}), overrides, tokenizer)
    if tokenizer is not None and foreign:
        text = msgspec.structs.replace(text, checked_against=check_against_transformers(tokenizer))
    scoring = _convert(metadata.get("scoring", {}), "scoring", Scoring)
    if foreign and "aggregation" not in metadata["scoring"] and overrides.step_text is not None:
        scoring = msgspec.structs.replace(scoring, aggregation="step_last")
    scoring = _scoring(scoring, overrides, text, tokenizer)
    check_scoring(model, scoring)
    if isinstance(model, LanguageModel) and is_stepwise(scoring.aggregation):
        _check_steps(scoring, text)
    limits = _limits(_convert(metadata.get("limits", {}), "limits", Limits), overrides)
    return Checkpoint(model, reload, scoring, text, limits, tokenizer, metadata.get("remarks", []))


def check_scoring(model: LanguageModel | TwoHeadedNetwork, scoring: Scoring) -> None:
    """Refuse a scoring rule that this model cannot have.

    Raises:
        ExportError: a label that the scorer lacks, a softmax over one label, or a token outside the vocabulary.
    """
    network = model.config.network if isinstance(model, LanguageModel) else model.config
    if not 0 <= scoring.label < network.num_labels:
        raise ExportError(f"scoring label {scoring.label}: the scorer has {network.num_labels} labels, counted from 0")
    if scoring.activation == "softmax" and network.num_labels == 1:
        raise ExportError(
            "activation softmax: the scorer has one label, so every score would be 1; use sigmoid or none"
        )
    if not isinstance(model, LanguageModel):
        return
    last = model.config.vocab_size - 1
    tokens = {name: getattr(scoring, name) for name in ("step_token", "end_token", "pad_token")}
    tokens |= {f"stop_tokens[{i}]": token for i, token in enumerate(scoring.stop_tokens)}
    for name, token in tokens.items():
        if token is not None and not 0 <= token <= last:
            raise ExportError(f"scoring {name}: {token} is outside the vocabulary (0 to {last})")


def _check_steps(scoring: Scoring, text: TextRules) -> None:
    if scoring.step_token is None and text.step_text is None:
        raise InputError(
            f"aggregation {scoring.aggregation} ({scoring.steps_from or 'config.json'}) reads the ends of steps, "
            "but nothing says where a step ends: pass --step-text for a checkpoint with a tokenizer, set "
            "scoring.step_token in a config.json of bonnx, or pass --aggregation last"
        )


def _text(settings: dict[str, Any], overrides: Overrides, tokenizer: TextFiles | None) -> TextRules:
    stated = {n: v for n in ("step_text", "step_split") if (v := getattr(overrides, n)) is not None}
    for name, value in stated.items():
        option = f"--{name.replace('_', '-')}"
        if tokenizer is None:
            raise InputError(f"{option}: the checkpoint has no tokenizer (tokenizer.json), so it takes no text")
        if not value:
            raise InputError(f"{option}: expected a text; got an empty one")
    rules: TextRules = _convert({**settings, **stated}, "text", TextRules)
    if rules.step_split is not None and rules.step_text is None:
        raise InputError("--step-split: expected --step-text too, the text that each step is ended with")
    return TextRules() if tokenizer is None else rules


def _label_tokens(overrides: Overrides, tokenizer: TextFiles | None, foreign: bool) -> tuple[int, ...] | None:
    texts, ids = overrides.label_tokens, overrides.label_token_ids
    if texts is None and ids is None:
        return None
    option, tokens_or_ids = ("--label-tokens", texts) if ids is None else ("--label-token-ids", ids)
    if texts is not None and ids is not None:
        raise InputError("--label-tokens and --label-token-ids: expected one of the two, texts or ids")
    if not foreign or tokens_or_ids is None or len(tokens_or_ids) < 2:
        raise InputError(
            f"{option}: expected the token that means good and at least one other, of a language model as "
            f"transformers writes it; got {tokens_or_ids}"
        )
    if ids is None and tokenizer is None:
        raise InputError("--label-tokens: the checkpoint has no tokenizer; pass --label-token-ids")
    tokens = tuple(ids) if ids is not None else tuple(_token(text, tokenizer) for text in texts or ())
    if len(set(tokens)) < len(tokens):
        raise InputError(f"{option}: expected different tokens; got {tokens_or_ids}, which are {list(tokens)}")
    return tokens


def _token(text: str, tokenizer: TextFiles | None) -> int:
    """The id of the one token that a text is."""
    assert tokenizer is not None
    ids = _ids(text, tokenizer)
    if len(ids) != 1:
        meant = f"; if it is an id, pass it to --label-token-ids {text}" if text.isdecimal() else ""
        raise InputError(f"--label-tokens: {text!r} is {len(ids)} tokens; expected the text of exactly one{meant}")
    return ids[0]


def _ids(text: str, tokenizer: TextFiles) -> list[int]:
    tokens: list[int] = tokenizers.Tokenizer.from_buffer(tokenizer.json).encode(text, add_special_tokens=False).ids
    return tokens


def _scoring(scoring: Scoring, overrides: Overrides, text: TextRules, tokenizer: TextFiles | None) -> Scoring:
    changes: dict[str, Any] = {}
    if overrides.aggregation is not None:
        changes["aggregation"] = overrides.aggregation
    if overrides.activation is not None:
        changes["activation"] = overrides.activation
    if overrides.label is not None:
        if overrides.label_tokens is not None or overrides.label_token_ids is not None:
            raise InputError("--label: of label tokens the first is the score; leave it out, and put that token first")
        changes["label"] = _label(overrides.label, scoring.labels)
    elif overrides.label_tokens is None and overrides.label_token_ids is None and len(scoring.labels) > 2:
        raise InputError(
            f"the model has {len(scoring.labels)} labels ({', '.join(scoring.labels)}); say with --label which of them "
            "is the score"
        )
    if overrides.step_text is not None:
        # For graphs that see tokens only; a text that several tokens make is found by its characters.
        changes["step_token"] = None
    if text.step_text is not None and tokenizer is not None and (scoring.step_token is None or "step_token" in changes):
        ids = _ids(text.step_text, tokenizer)
        changes["step_token"] = ids[0] if len(ids) == 1 else None
    changes["steps_from"] = _steps_from(scoring, overrides, text)
    return msgspec.structs.replace(scoring, **changes)


def _steps_from(scoring: Scoring, overrides: Overrides, text: TextRules) -> str | None:
    """What says where steps end, or that there are any."""
    if overrides.step_text is not None:
        return "--step-text"
    if overrides.aggregation is not None and is_stepwise(overrides.aggregation) and scoring.steps_from is None:
        known = scoring.step_token is not None or text.step_text is not None
        return "config.json" if known else "--aggregation"
    if scoring.steps_from is not None:
        return scoring.steps_from
    if scoring.step_token is not None:
        return "config.json, 'scoring': step_token"
    return "config.json, 'text': step_text" if text.step_text is not None else None


def _label(text: str, labels: list[str]) -> int:
    if labels.count(text) > 1:
        raise InputError(f"--label: {labels.count(text)} labels have the name {text!r}; pass its number from 0")
    if text in labels:
        return labels.index(text)
    if text.isdecimal() and int(text) < max(1, len(labels)):
        return int(text)
    raise InputError(f"--label: expected one of {', '.join(labels)} or its number from 0; got {text!r}")


def _limits(limits: Limits, overrides: Overrides) -> Limits:
    changes = {n: v for n in ("max_tokens", "max_candidates") if (v := getattr(overrides, n)) is not None}
    for name, value in changes.items():
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1; got {value}")
    return msgspec.structs.replace(limits, **changes)


def _convert(settings: dict[str, Any], key: str, kind: type[Any]) -> Any:
    try:
        return msgspec.convert(settings, kind)
    except msgspec.ValidationError as e:
        raise ConfigError(f"config.json, '{key}': {e}") from e

"""What is exported: a checkpoint's model, the rules that its config states, and what the caller states instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import tokenizers

from ..models.checkpoint import load_checkpoint, read_config
from ..models.config import ConfigError
from ..models.huggingface import is_huggingface
from ..models.network import LanguageModel, TwoHeadedNetwork
from ..runtime.errors import InputError
from ..runtime.manifest import Limits, Scoring, TextRules
from .tokenizer import TextFiles, check_vocabulary, read_tokenizer
from .tokenizer_check import check_against_transformers

__all__ = ["Overrides", "Source", "read_source"]


class Overrides(NamedTuple):
    """What a caller states; None leaves what the checkpoint says. Named as the options of `bonnx export`."""

    aggregation: str | None = None
    activation: str | None = None
    label: str | None = None
    label_tokens: list[str] | None = None
    step_text: str | None = None
    step_split: str | None = None
    max_tokens: int | None = None
    max_candidates: int | None = None


@dataclass(frozen=True)
class Source:
    """A checkpoint.

    Attributes:
        model: float32, in inference mode.
        reload: gives it once more, from the files.
        scoring: how positions become one score.
        text: how text becomes tokens.
        limits: of the runtime.
        tokenizer: None if the folder has none.
    """

    model: LanguageModel | TwoHeadedNetwork
    reload: Callable[[], LanguageModel | TwoHeadedNetwork]
    scoring: Scoring
    text: TextRules
    limits: Limits
    tokenizer: TextFiles | None


def read_source(folder: Path, overrides: Overrides) -> Source:
    """Read a checkpoint's folder.

    Raises:
        ConfigError: it is no checkpoint, or not one that is supported.
        InputError: an override has no meaning for it.
    """
    tokenizer, config = read_tokenizer(folder), read_config(folder)
    foreign = is_huggingface(config)
    label_tokens = _label_tokens(overrides, tokenizer, foreign)

    def reload() -> LanguageModel | TwoHeadedNetwork:
        return load_checkpoint(folder, label_tokens=label_tokens)[0]

    model, metadata = load_checkpoint(folder, label_tokens=label_tokens)
    if tokenizer is not None and isinstance(model, LanguageModel):
        check_vocabulary(tokenizer, model.config.vocab_size)
    stated = {n: v for n in ("step_text", "step_split") if (v := getattr(overrides, n)) is not None}
    text = _convert({**metadata.get("text", {}), **stated}, "text", TextRules)
    if tokenizer is None:
        text = TextRules()
    elif foreign:
        text = msgspec.structs.replace(text, checked_against=check_against_transformers(tokenizer))
    scoring = _scoring(_convert(metadata.get("scoring", {}), "scoring", Scoring), overrides, text, tokenizer)
    limits = _limits(_convert(metadata.get("limits", {}), "limits", Limits), overrides)
    return Source(model, reload, scoring, text, limits, tokenizer)


def _label_tokens(overrides: Overrides, tokenizer: TextFiles | None, foreign: bool) -> tuple[int, ...] | None:
    given = overrides.label_tokens
    if given is None:
        return None
    if not foreign or len(given) < 2:
        raise InputError(
            "--label-tokens: expected the token that means good and at least one other, of a language model as "
            f"transformers writes it; got {given}"
        )
    if tokenizer is None and not all(token.isdecimal() for token in given):
        raise InputError("--label-tokens: the checkpoint has no tokenizer; pass token ids")
    return tuple(_token(text, tokenizer) for text in given)


def _token(text: str, tokenizer: TextFiles | None) -> int:
    """The id of one token, given as that number or as its text."""
    if text.isdecimal() or tokenizer is None:
        return int(text)
    ids = _ids(text, tokenizer)
    if len(ids) != 1:
        raise InputError(
            f"--label-tokens: {text!r} is {len(ids)} tokens; expected the text of exactly one, or a token id"
        )
    return ids[0]


def _ids(text: str, tokenizer: TextFiles) -> list[int]:
    found: list[int] = tokenizers.Tokenizer.from_buffer(tokenizer.json).encode(text, add_special_tokens=False).ids
    return found


def _scoring(scoring: Scoring, overrides: Overrides, text: TextRules, tokenizer: TextFiles | None) -> Scoring:
    changes: dict[str, Any] = {}
    if overrides.aggregation is not None:
        changes["aggregation"] = overrides.aggregation
    if overrides.activation is not None:
        changes["activation"] = overrides.activation
    if overrides.label is not None:
        changes["label"] = _label(overrides.label, scoring.labels)
    elif overrides.label_tokens is None and len(scoring.labels) > 2:
        raise InputError(
            f"the model has {len(scoring.labels)} labels ({', '.join(scoring.labels)}); say with --label which of them "
            "is the score"
        )
    if text.step_text is not None and scoring.step_token is None and tokenizer is not None:
        ids = _ids(text.step_text, tokenizer)
        # For graphs that see tokens only; a text that several tokens make is found by its characters.
        changes["step_token"] = ids[0] if len(ids) == 1 else None
    return msgspec.structs.replace(scoring, **changes)


def _label(given: str, labels: list[str]) -> int:
    if given in labels:
        return labels.index(given)
    if given.isdecimal() and int(given) < max(1, len(labels)):
        return int(given)
    raise InputError(f"--label: expected one of {', '.join(labels)} or its number from 0; got {given!r}")


def _limits(limits: Limits, overrides: Overrides) -> Limits:
    changes = {n: v for n in ("max_tokens", "max_candidates") if (v := getattr(overrides, n)) is not None}
    for name, value in changes.items():
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1; got {value}")
    return msgspec.structs.replace(limits, **changes)


def _convert(given: dict[str, Any], key: str, kind: type[Any]) -> Any:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as e:
        raise ConfigError(f"config.json, '{key}': {e}") from e

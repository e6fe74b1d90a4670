"""Read a checkpoint for export: its model, and the rules in its config with the caller's overrides applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec

from bonnx.errors import ExportError, InputError
from bonnx.models.checkpoint import load_checkpoint
from bonnx.models.config import ConfigError, NetworkConfig
from bonnx.models.fields import check_fields
from bonnx.models.head_file import HeadFile, read_head_file
from bonnx.models.huggingface import is_huggingface
from bonnx.models.network import LanguageModel, TwoHeadedNetwork
from bonnx.models.opened import OpenedCheckpoint, open_checkpoint
from bonnx.runtime.artifact.manifest import Limits, Scoring, TextRules
from bonnx.runtime.selection.aggregate import is_stepwise

from .label_tokens import read_label_tokens, token_ids
from .published_rerankers import resembling
from .reranker import Reranker, find_reranker, with_instruction
from .tokenizer import TextFiles, check_vocabulary, read_tokenizer, with_pair_template
from .tokenizer_check import check_against_transformers

__all__ = ["Checkpoint", "Overrides", "check_scoring", "default_scoring", "read_checkpoint"]

_Loaded: TypeAlias = tuple[LanguageModel | TwoHeadedNetwork, dict[str, Any]]


class Overrides(NamedTuple):
    """Values that override the checkpoint's own unless they are None, named like the options of `bonnx export`."""

    aggregation: str | None = None
    activation: str | None = None
    label: str | None = None
    label_tokens: list[str] | None = None
    label_token_ids: list[int] | None = None
    reranker: str | None = None
    instruction: str | None = None
    step_text: str | None = None
    step_split: str | None = None
    max_tokens: int | None = None
    max_candidates: int | None = None
    head: Path | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is ready to export.

    Attributes:
        model: the float32 model, in inference mode.
        reload: loads the model again from the files.
        scoring: how the scores of positions become one.
        text: how text becomes tokens.
        limits: maximum sizes that the runtime accepts.
        tokenizer: the tokenizer's files; None if the folder has none.
        remarks: sentences for the user, one for each setting of the checkpoint that is ignored.
        source: what the checkpoint was made from, if its name does not say so (`OpenedCheckpoint.source`).
    """

    model: LanguageModel | TwoHeadedNetwork
    reload: Callable[[], LanguageModel | TwoHeadedNetwork]
    scoring: Scoring
    text: TextRules
    limits: Limits
    tokenizer: TextFiles | None
    remarks: list[str]
    source: str | None = None


def read_checkpoint(
    checkpoint: Path | OpenedCheckpoint,
    overrides: Overrides,
    *,
    no_scorer: bool = False,
    repository: str | None = None,
) -> Checkpoint:
    """Read a checkpoint.

    Args:
        checkpoint: its folder, or what `open_checkpoint` returned for it.
        overrides: the caller's own settings.
        no_scorer: leave the scorer out, if there is one, so that the artifact only generates.
        repository: `org/name`, if the folder was downloaded from a hub; a published reranker is recognized by it.

    Raises:
        ConfigError: if the folder is not a checkpoint, or not a supported one.
        ExportError: if the scoring rule is invalid for the model (`check_scoring`).
        InputError: if an override does not suit the checkpoint, or scores are read at the ends of steps but nothing
            defines where steps end.
    """
    opened = checkpoint if isinstance(checkpoint, OpenedCheckpoint) else open_checkpoint(checkpoint)
    foreign = is_huggingface(opened.config)
    if foreign:
        # First, because its message is the most helpful one for an unsupported family.
        check_fields(opened.config)
    _check_no_scorer(overrides, no_scorer)
    tokenizer = read_tokenizer(opened.tokenizer)
    label_tokens = read_label_tokens(overrides.label_tokens, overrides.label_token_ids, tokenizer, foreign)
    head = _head(overrides)
    stated = label_tokens is not None or head is not None or no_scorer
    reranker = None if stated or not foreign else _reranker(opened, overrides, tokenizer, repository)
    _check_reranker(overrides, reranker)
    if reranker is not None and tokenizer is not None:
        label_tokens, tokenizer = reranker.labels, with_pair_template(tokenizer, reranker.template)

    def load() -> _Loaded:
        return load_checkpoint(opened, label_tokens=label_tokens, no_scorer=no_scorer, head=head)

    model, metadata = load() if reranker is not None else _load_unknown(load, opened)
    _check_vocabulary(tokenizer, model)
    text = _text(metadata.get("text", {}), overrides, tokenizer)
    scoring, remarks = _convert(metadata.get("scoring", {}), "scoring", Scoring), metadata.get("remarks", [])
    if reranker is not None:
        scoring = msgspec.structs.replace(scoring, activation=reranker.activation or scoring.activation)
        text = msgspec.structs.replace(text, pair=reranker.rules)
        remarks = [remark for remark in remarks if "activation" not in remark]  # here it is applied
    if tokenizer is not None and foreign:
        text = msgspec.structs.replace(text, checked_against=check_against_transformers(tokenizer, text.pair))
    if not _network(model).has_scorer:
        scoring = _self_certainty(scoring)
    elif foreign and "aggregation" not in metadata["scoring"] and overrides.step_text is not None:
        scoring = msgspec.structs.replace(scoring, aggregation="step_last")
    scoring = _with_gate(scoring, metadata.get("gate_header"), tokenizer)
    scoring = _scoring(scoring, overrides, text, tokenizer)
    check_scoring(model, scoring)
    if isinstance(model, LanguageModel) and is_stepwise(scoring.aggregation):
        _check_steps(scoring, text)
    limits = _limits(_convert(metadata.get("limits", {}), "limits", Limits), overrides, reranker)
    return Checkpoint(model, lambda: load()[0], scoring, text, limits, tokenizer, remarks, opened.source)


def _check_vocabulary(tokenizer: TextFiles | None, model: LanguageModel | TwoHeadedNetwork) -> None:
    if tokenizer is not None and isinstance(model, LanguageModel):
        check_vocabulary(tokenizer, model.config.vocab_size)


def check_scoring(model: LanguageModel | TwoHeadedNetwork, scoring: Scoring) -> None:
    """Refuse a scoring rule that is invalid for the model.

    Raises:
        ExportError: if the scorer lacks the label, a softmax is over a single label, or a token is not in the
            vocabulary.
    """
    network = _network(model)
    if network.has_scorer != (scoring.token_score == "scorer"):
        raise ExportError(
            f"scoring token_score: {scoring.token_score}, but the model's scorer is {network.scorer_kind}"
        )
    if not 0 <= scoring.label < network.num_labels:
        raise ExportError(f"scoring label: expected 0 to {network.num_labels - 1}; got {scoring.label}")
    if (network.scorer_kind == "gated") != bool(scoring.gate_tokens) or (
        scoring.gate_tokens and scoring.activation == "softmax"
    ):
        raise ExportError(
            "scoring gate_tokens: a gated scorer needs the tokens of a turn's header, and no softmax; any other scorer "
            "has none"
        )
    if scoring.activation == "softmax" and network.num_labels == 1:
        raise ExportError(
            "activation softmax: the scorer has one label, so every score would be 1; use sigmoid or none"
        )
    if not isinstance(model, LanguageModel):
        return
    last = model.config.vocab_size - 1
    tokens = {name: getattr(scoring, name) for name in ("step_token", "end_token", "reward_token", "pad_token")}
    for name in ("stop_tokens", "gate_tokens"):
        tokens |= {f"{name}[{i}]": token for i, token in enumerate(getattr(scoring, name))}
    for name, token in tokens.items():
        if token is not None and not 0 <= token <= last:
            raise ExportError(f"scoring {name}: {token} is outside the vocabulary (0 to {last})")


def default_scoring(model: LanguageModel | TwoHeadedNetwork) -> Scoring:
    """The scoring rule of a model for which no other is known."""
    return Scoring() if _network(model).has_scorer else _self_certainty(Scoring())


def _network(model: LanguageModel | TwoHeadedNetwork) -> NetworkConfig:
    return model.config.network if isinstance(model, LanguageModel) else model.config


def _self_certainty(scoring: Scoring) -> Scoring:
    """The rule of a model without a scorer: the mean of its self-certainty; tokens and steps as they were."""
    return msgspec.structs.replace(
        scoring, token_score="self_certainty", aggregation="mean", activation="none", label=0, labels=[]
    )


def _check_no_scorer(overrides: Overrides, no_scorer: bool) -> None:
    if not no_scorer:
        return
    for name in ("activation", "label", "label_tokens", "label_token_ids", "reranker", "instruction", "head"):
        if getattr(overrides, name) is not None:
            raise InputError(f"--no-scorer: --{name.replace('_', '-')} belongs to a scorer; leave one of them out")


def _reranker(
    opened: OpenedCheckpoint, overrides: Overrides, tokenizer: TextFiles | None, repository: str | None
) -> Reranker | None:
    """Return how the checkpoint scores a query and a document; an adapter scores as the base model that it is on."""
    base, at, _ = (opened.source or "").rpartition(" on ")[2].partition("@")
    repository = base if at else repository
    found = find_reranker(opened, tokenizer, name=overrides.reranker, repository=repository)
    if found is None or tokenizer is None or overrides.instruction is None:
        return found
    return with_instruction(found, tokenizer, overrides.instruction)


def _load_unknown(load: Callable[[], _Loaded], opened: OpenedCheckpoint) -> _Loaded:
    """Load a checkpoint that nothing describes as a reranker; an error says if its name is that of one."""
    try:
        return load()
    except ConfigError as e:
        name = resembling(opened.path, opened.config)
        raise ConfigError(f"{e}. By its name it may be a reranker: pass --reranker {name}") if name else e from e


def _check_reranker(overrides: Overrides, reranker: Reranker | None) -> None:
    """Refuse options that do not go together."""
    if overrides.reranker is not None and reranker is None:
        raise InputError(
            "--reranker: expected a language model in the format of transformers, and neither --label-tokens nor "
            "--label-token-ids, which the reranker defines"
        )
    if overrides.instruction is not None and reranker is None:
        raise InputError("--instruction: it goes into the template of a reranker, and the checkpoint is none")
    if overrides.step_text is not None and reranker is not None:
        raise InputError("--step-text: a reranker scores whole documents; leave it out")


def _check_steps(scoring: Scoring, text: TextRules) -> None:
    if scoring.step_token is None and text.step_text is None:
        raise InputError(
            f"aggregation {scoring.aggregation} ({scoring.steps_from or 'config.json'}) reads scores at the ends of "
            "steps, but nothing defines where a step ends: pass --step-text for a checkpoint with a tokenizer, set "
            "scoring.step_token in bonnx's config.json, or pass --aggregation last"
        )


def _text(settings: dict[str, Any], overrides: Overrides, tokenizer: TextFiles | None) -> TextRules:
    stated = {n: v for n in ("step_text", "step_split") if (v := getattr(overrides, n)) is not None}
    for name, value in stated.items():
        option = f"--{name.replace('_', '-')}"
        if tokenizer is None:
            raise InputError(f"{option}: the checkpoint has no tokenizer (tokenizer.json), so it cannot read text")
        if not value:
            raise InputError(f"{option}: expected a text; got an empty one")
    rules: TextRules = _convert({**settings, **stated}, "text", TextRules)
    if rules.step_split is not None and rules.step_text is None:
        raise InputError("--step-split: expected --step-text too, the text that ends each step")
    return TextRules() if tokenizer is None else rules


def _head(overrides: Overrides) -> HeadFile | None:
    if overrides.head is None:
        return None
    if overrides.label_tokens is not None or overrides.label_token_ids is not None:
        raise InputError("--head: --label-tokens and --label-token-ids are a head themselves; leave one of them out")
    return read_head_file(overrides.head)


def _scoring(scoring: Scoring, overrides: Overrides, text: TextRules, tokenizer: TextFiles | None) -> Scoring:
    changes: dict[str, Any] = {}
    if overrides.aggregation is not None:
        changes["aggregation"] = overrides.aggregation
    if overrides.activation is not None:
        changes["activation"] = overrides.activation
    if overrides.label is not None:
        if overrides.label_tokens is not None or overrides.label_token_ids is not None:
            raise InputError(
                "--label: the score is that of the first label token; omit --label, and put the desired token first"
            )
        if scoring.gate_tokens:
            raise InputError("--label: a gate weighs all labels of this model; they are reported as objectives")
        changes["label"] = _label(overrides.label, scoring.labels)
    elif (
        not scoring.gate_tokens
        and len(scoring.labels) > 2
        and all(getattr(overrides, n) is None for n in ("label_tokens", "label_token_ids", "head"))
    ):
        raise InputError(
            f"the model has {len(scoring.labels)} labels ({', '.join(scoring.labels)}); choose the one that is the "
            "score with --label"
        )
    if overrides.step_text is not None:
        # Only the graphs need a token, since they see nothing else; elsewhere steps are found by their characters.
        changes["step_token"] = None
    if text.step_text is not None and tokenizer is not None and (scoring.step_token is None or "step_token" in changes):
        ids = token_ids(text.step_text, tokenizer)
        changes["step_token"] = ids[0] if len(ids) == 1 else None
    changes["steps_from"] = _steps_from(scoring, overrides, text)
    return msgspec.structs.replace(scoring, **changes)


def _with_gate(scoring: Scoring, header: str | None, tokenizer: TextFiles | None) -> Scoring:
    """Set the tokens that a gated scorer looks for."""
    if header is None:
        return scoring
    if tokenizer is None:
        raise InputError("the scorer's gate looks for the header of a turn, so the checkpoint needs a tokenizer.json")
    return msgspec.structs.replace(scoring, gate_tokens=token_ids(header, tokenizer))


def _steps_from(scoring: Scoring, overrides: Overrides, text: TextRules) -> str | None:
    """Return the name of the setting that defines where steps end, or implies that there are steps."""
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
        raise InputError(f"--label: {labels.count(text)} labels are named {text!r}; pass the label's number, from 0")
    if text in labels:
        return labels.index(text)
    if text.isdecimal() and int(text) < max(1, len(labels)):
        return int(text)
    expected = f"one of {', '.join(labels)}, or its number from 0" if labels else "none, because there is one label"
    raise InputError(f"--label: expected {expected}; got {text!r}")


def _limits(limits: Limits, overrides: Overrides, reranker: Reranker | None) -> Limits:
    if reranker is not None and reranker.max_tokens is not None:
        limits = msgspec.structs.replace(limits, max_tokens=min(limits.max_tokens, reranker.max_tokens))
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

"""A manifest's rules in words, for people."""

from __future__ import annotations

from collections.abc import Mapping

from .manifest import Manifest, Scoring

__all__ = ["describe_scoring", "describe_text", "listed"]


def listed(values: Mapping[str, object]) -> str:
    """Names and values, without those that are None."""
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def describe_scoring(scoring: Scoring) -> str:
    """How positions become a score, in words."""
    read = scoring.aggregation.removeprefix("step_")
    where = "the ends of steps" if scoring.aggregation.startswith("step_") else "all tokens"
    parts = ["the last token" if scoring.aggregation == "last" else f"{read} of {where}"]
    if scoring.token_score == "self_certainty":
        parts.insert(0, "no scorer: self-certainty of the language model")
    if scoring.gate_tokens:
        parts.append(f"{len(scoring.labels)} objectives, weighted by a gate that reads the prompt")
    elif len(scoring.labels) > 1:
        parts.append(f"label {scoring.labels[scoring.label]} of {', '.join(scoring.labels)}")
    elif scoring.label:
        parts.append(f"label {scoring.label}")
    parts.append({"none": "raw"}.get(scoring.activation, f"{scoring.activation}: probabilities"))
    if scoring.steps_from is not None:
        parts.append(f"steps according to {scoring.steps_from}")
    tokens = {
        "step token": scoring.step_token,
        "end token": scoring.end_token,
        "reward token": scoring.reward_token,
        "pad token": scoring.pad_token,
        "stop tokens": scoring.stop_tokens or None,
    }
    return f"{', '.join(parts)}; {listed(tokens)}"


def describe_text(manifest: Manifest) -> str | None:
    """How text becomes tokens, in words."""
    if manifest.tokenizer is None:
        return None
    rules, parts = manifest.text, ["tokenizer"]
    parts.append("special tokens added" if rules.special_tokens else "no special tokens added")
    if rules.pair is None:
        parts.append("chat template" if rules.chat_template is not None else "no chat template")
    else:
        stated = "" if rules.pair.instruction is None else f", with the instruction {rules.pair.instruction!r}"
        parts.append(f"template of a query and a document{stated}")
    if rules.step_text is not None:
        split = "" if rules.step_split is None else f", put where {rules.step_split!r} divides them"
        parts.append(f"steps end with {rules.step_text!r}{split}")
    if rules.checked_against is not None:
        parts.append(f"as in transformers {rules.checked_against}")
    return ", ".join(parts)

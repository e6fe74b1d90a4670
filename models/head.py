"""Recognize the head of a transformers checkpoint by its tensors, and determine how its score is read.

=================================  ========================================  =====================  =================
tensors                            written by                                scorer                 read at
=================================  ========================================  =====================  =================
score.weight [score.bias]          *ForSequenceClassification                linear                 last token
the same                           *ForTokenClassification                   linear                 ends of steps
score.0.*, score.2.*               *ForRewardModel                           Linear, ReLU, Linear   last token
the same                           *ForProcessRewardModel                    Linear, ReLU, Linear   ends of steps
v_head.summary.* or v_head.*       a model with a value head                 linear                 last token
the same                           *ForPrmModel                              linear, sigmoid        ends of steps
none                               *ForCausalLM that answers with a token    rows of lm_head        chosen by caller
=================================  ========================================  =====================  =================

The tensors do not show whether steps are scored; the architecture or the caller determines that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import ConfigError
from .fields import normalizes

__all__ = ["PARTS", "Head", "architecture", "read_head"]

PARTS = ("weight", "bias")
_STEPWISE = ("ForTokenClassification", "ForProcessRewardModel", "ForPrmModel")
_LINEAR = ("score", "v_head.summary", "v_head")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Head:
    """A recognized head, in bonnx's terms.

    Attributes:
        options: options of `NetworkConfig`.
        names: our parameter name -> the checkpoint's.
        scoring: fields of the artifact's scoring rule; without `aggregation` if it is unknown whether steps are scored.
        steps: how a step ends in text: `step_text` and `step_split`.
        normal: mean and standard deviation of rewards, which standardize the head's output; or None.
    """

    options: dict[str, Any]
    names: dict[str, str] = field(default_factory=dict)
    scoring: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    normal: tuple[float, float] | None = None


def architecture(config: Mapping[str, Any]) -> str:
    """Return the first class that config.json lists, or an empty string."""
    names = config.get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ConfigError(f"config.json, 'architectures': expected a list of names; found {names!r:.80}")
    return names[0]


def read_head(
    config: Mapping[str, Any],
    shapes: Shapes,
    further: list[str],
    label_tokens: tuple[int, ...] | None,
    new_scorer: bool,
    no_scorer: bool = False,
) -> Head:
    """Find the head among the tensors.

    Args:
        config: the parsed config.json.
        shapes: the shape of every tensor, by name.
        further: names of the tensors that belong neither to the backbone nor to the vocabulary head.
        label_tokens: the tokens whose logits are the labels, for a model that answers with one.
        new_scorer: add a new scorer to a model without a head.
        no_scorer: accept a model without a head as it is.

    Raises:
        ConfigError: if there is no supported head; the message lists the unrecognized tensors.
    """
    if label_tokens is not None:
        options = {"scorer_kind": "linear", "scorer_bias": False, "num_labels": len(label_tokens)}
        return Head(options, scoring={"activation": "softmax"})
    if "score.0.weight" in shapes and "score.2.weight" in shapes:
        return _mlp(config, shapes)
    for name in _LINEAR:
        if f"{name}.weight" in shapes:
            return _linear(config, shapes, name)
    if new_scorer:
        return Head({}, scoring={"activation": "sigmoid"})
    if no_scorer and not further:
        return Head({"scorer_kind": "none"})
    raise ConfigError(_no_head(config, shapes, further))


def _mlp(config: Mapping[str, Any], shapes: Shapes) -> Head:
    labels = _labels(config.get("id2label"), shapes["score.2.weight"][0])
    options = {"scorer_kind": "mlp", "scorer_activation": "relu", "scorer_hidden": shapes["score.0.weight"][0]}
    names = {f"network.scorer.dense{i}.{p}": f"score.{n}.{p}" for i, n in ((1, 0), (2, 2)) for p in PARTS}
    # As its authors use it: steps are separated by blank lines, and each ends with a special token.
    known = architecture(config).endswith("ForProcessRewardModel")
    steps = {"step_text": "<extra_0>", "step_split": "\n\n"} if known else {}
    scoring = _rule(labels) | _reading(config)
    return Head({**options, "num_labels": len(labels)}, names, scoring, steps, _normal(config, len(labels)))


def _linear(config: Mapping[str, Any], shapes: Shapes, name: str) -> Head:
    value = name != "score"
    labels = _labels(None if value else config.get("id2label"), shapes[f"{name}.weight"][0])
    bias, normal = f"{name}.bias" in shapes, _normal(config, len(labels))
    options = {"scorer_kind": "linear", "scorer_bias": bias or normal is not None, "num_labels": len(labels)}
    names = {f"network.scorer.dense2.{p}": f"{name}.{p}" for p in (PARTS if bias else PARTS[:1])}
    scoring = _rule(labels) | _reading(config)
    if value and architecture(config).endswith("ForPrmModel"):
        scoring["activation"] = "sigmoid"
    elif value and scoring["aggregation"] == "last":
        # A value head may score steps as well, so the caller decides.
        del scoring["aggregation"]
    known = architecture(config).endswith("ForPrmModel" if value else "ForTokenClassification")
    return Head(options, names, scoring, {"step_text": "\n"} if known else {}, normal)


def _reading(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return where the score is read, and the setting that determines it."""
    name = architecture(config)
    if not name.endswith(_STEPWISE):
        return {"aggregation": "last"}
    return {"aggregation": "step_last", "steps_from": f"config.json, 'architectures': {name}"}


def _labels(named: Any, count: int) -> list[str]:
    """Return the names of the labels in order."""
    if named is None:
        return [f"LABEL_{i}" for i in range(count)]
    if not isinstance(named, dict):
        raise ConfigError(
            f"config.json, 'id2label': expected an object that maps numbers to names; found {named!r:.80}"
        )
    if {str(i) for i in range(count)} != {str(key) for key in named}:
        raise ConfigError(
            f"config.json, 'id2label': it names {len(named)} labels, but the weights of the head have {count}; the "
            "config or the weights belong to another model"
        )
    return [str({str(key): name for key, name in named.items()}[str(i)]) for i in range(count)]


def _rule(labels: list[str]) -> dict[str, Any]:
    """Return the usual rule: a single label as it is; of two, the probability of the second; of more, no default."""
    rule: dict[str, Any] = {"labels": labels}
    if len(labels) == 2:
        rule |= {"activation": "softmax", "label": 1}
    return rule


def _normal(config: Mapping[str, Any], labels: int) -> tuple[float, float] | None:
    """Return the mean and standard deviation of rewards if scores are normalized by them (OpenRLHF)."""
    if not normalizes(config):
        return None
    mean, std = config["mean"], config.get("std")
    numbers = [x for x in (mean, std) if isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)]
    if len(numbers) != 2 or numbers[1] <= 0 or labels != 1:
        raise ConfigError(
            f"config.json, 'normalize_reward': expected numbers 'mean' and 'std' above 0, and a head of one label; "
            f"found {mean!r:.40}, {std!r:.40} and {labels} labels; set 'normalize_reward' to false for raw scores"
        )
    return float(numbers[0]), float(numbers[1])


def _no_head(config: Mapping[str, Any], shapes: Shapes, further: list[str]) -> str:
    name = architecture(config)
    declared = f"'architectures' is {name}" if name else "'architectures' is missing"
    start = f"the checkpoint has no scorer that is supported (config.json, {declared}): "
    if further:
        shown = ", ".join(f"{tensor} {shapes[tensor]}" for tensor in further[:6])
        more = f" and {len(further) - 6} more" if len(further) > 6 else ""
        return (
            f"{start}besides the backbone it has {shown}{more}; expected score.weight, score.0.weight with "
            "score.2.weight, v_head.weight or v_head.summary.weight (docs/reward_models.md lists the supported heads). "
            "A single linear layer that is read at the last token can be renamed to score.weight"
        )
    return (
        f"{start}besides the backbone it has no tensors; expected score.weight, score.0.weight with score.2.weight, "
        "v_head.weight or v_head.summary.weight. For a language model that answers with a token, pass --label-tokens; "
        "for any other, train a scorer first, see docs/scorer.md, or pass --no-scorer for one that only generates"
    )

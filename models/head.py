"""Recognize the head of a transformers checkpoint by its tensors, and determine how its score is read.

=================================  ========================================  =====================  =================
tensors                            written by                                scorer                 read at
=================================  ========================================  =====================  =================
score.weight [score.bias]          *ForSequenceClassification, OpenRLHF      linear                 last token
the same                           *ForTokenClassification                   linear                 ends of steps
score.0.*, score.2.*               *ForRewardModel                           Linear, ReLU, Linear   last token
the same                           *ForProcessRewardModel                    Linear, ReLU, Linear   ends of steps
v_head.summary.* or v_head.*       a model with a value head                 linear                 last token
the same                           *ForPrmModel                              linear, sigmoid        ends of steps
v_head.*                           Athene, InternLM2-Reward                  linear                 an appended token
v_head.summary.0.*, .2.*, ...      GRM                                       Linear, ReLU, ...      last token
value_head, regression_head,       OpenRLHF, Eurus and UltraRM,              linear                 last token
score_head, reward_head            Beaver, others
regression_layer, gating.layers.*  ArmoRM, QRM                               gate.py                last token
none                               *ForCausalLM that answers with a token    rows of lm_head        chosen by caller
=================================  ========================================  =====================  =================

The tensors do not show whether steps are scored; the architecture or the caller determines that. `head_file.py` reads
a declaration of any other head.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

from .config import ConfigError
from .fields import normalizes

if TYPE_CHECKING:
    from .gate import GateTensors

__all__ = [
    "PARTS",
    "Head",
    "LabelTokens",
    "Shapes",
    "architecture",
    "further_text",
    "layers_of",
    "linear_layers",
    "read_head",
]

PARTS = ("weight", "bias")
_STEPWISE = ("ForTokenClassification", "ForProcessRewardModel", "ForPrmModel")
_BASES = ("score", "v_head.summary", "v_head", "value_head", "regression_head", "score_head", "reward_head")
# Their texts end with the tokenizer's cls token, which is in no config.
_APPENDS_CLS = ("AtheneForSequenceClassification", "CustomAutoModelForSequenceClassification")
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
        appended: the token that ends every text, at which the score is read: its id, its text, or the name of a
            special token; None for a head that reads the text's own last token.
        gate: where the tensors of a gated head are; its parameters are computed from them.
        header: the text that the gate looks for.
        unused: tensors of the head from which the score is not computed, by name or the part of it before a dot.
    """

    options: dict[str, Any]
    names: dict[str, str] = field(default_factory=dict)
    scoring: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    normal: tuple[float, float] | None = None
    appended: int | str | None = None
    gate: GateTensors | None = None
    header: str | None = None
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelTokens:
    """The tokens with which a language model answers; their rows of the vocabulary head become the scorer.

    Attributes:
        ids: the token that means good, then the others.
        contrast: there is one label, as rerankers define it: the logit of the first token, minus that of the second if
            there is one. Otherwise each token is a label, and the score is the probability of the first.
        divisor: what a contrasted logit is divided by.
    """

    ids: tuple[int, ...]
    contrast: bool = False
    divisor: float = 1.0

    @property
    def count(self) -> int:
        """The number of labels."""
        return 1 if self.contrast else len(self.ids)


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
    label_tokens: LabelTokens | None,
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
        options = {"scorer_kind": "linear", "scorer_bias": False, "num_labels": label_tokens.count}
        return Head(options, scoring={} if label_tokens.contrast else {"activation": "softmax"})
    for base in _bases(config):
        if layers := layers_of(shapes, base):
            return _known(config, shapes, base, layers)
    if new_scorer:
        return Head({}, scoring={"activation": "sigmoid"})
    if no_scorer and not further:
        return Head({"scorer_kind": "none"})
    raise ConfigError(_no_head(config, shapes, further))


def _bases(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names that a head's tensors begin with; OpenRLHF writes its own into the config."""
    named = config.get("value_head_prefix")
    return (*_BASES, named) if isinstance(named, str) and named not in _BASES else _BASES


def layers_of(shapes: Shapes, base: str) -> list[str]:
    """Return the names of the linear layers `base`, or `base.0`, `base.2` and so on, in order."""
    if f"{base}.weight" in shapes:
        return [base]
    places = [name.removeprefix(f"{base}.").removesuffix(".weight") for name in shapes if name.startswith(f"{base}.")]
    return [f"{base}.{place}" for place in sorted({int(place) for place in places if place.isdecimal()})]


def linear_layers(
    shapes: Shapes, layers: Sequence[str], activation: str = "relu"
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the options and names of a scorer of linear layers, with an activation between them.

    Args:
        shapes: the shape of every tensor, by name.
        layers: names of the layers, without `.weight` and `.bias`, from the backbone to the score.
        activation: as in `NetworkConfig.scorer_activation`.

    Raises:
        ConfigError: if a weight is not a matrix, or does not read what the layer before it gives.
    """
    sizes = [shapes[f"{layer}.weight"] for layer in layers]
    for i, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        if len(size) != 2 or (i and size[1] != sizes[i - 1][0]):
            expected = f"(outputs, {sizes[i - 1][0]})" if i else "(outputs, inputs)"
            raise ConfigError(f"tensor '{layer}.weight': expected a matrix {expected}; got {size}")
    parts = [(layer, part) for layer in layers for part in PARTS if f"{layer}.{part}" in shapes]
    options: dict[str, Any] = {"scorer_kind": "linear", "num_labels": sizes[-1][0]}
    options["scorer_bias"] = any(part == "bias" for _, part in parts)
    if len(layers) > 1:
        inner = [size[0] for size in sizes[:-1]]
        options |= {"scorer_kind": "mlp", "scorer_activation": activation}
        options["scorer_hidden"] = inner[0] if len(inner) == 1 else inner
    # A single layer has the name of the second one of the original's scorer.
    number = {layer: i for i, layer in enumerate(layers, 1 if len(layers) > 1 else 2)}
    return options, {f"network.scorer.dense{number[layer]}.{part}": f"{layer}.{part}" for layer, part in parts}


def _known(config: Mapping[str, Any], shapes: Shapes, base: str, layers: list[str]) -> Head:
    for first, second in itertools.pairwise(layers):
        if int(second.rpartition(".")[2]) - int(first.rpartition(".")[2]) == 1:
            raise ConfigError(
                f"the head's layers '{first}' and '{second}' have no module between them, so the activation between "
                "them is unknown; declare the head with --head, see docs/reward_models.md"
            )
    options, names = linear_layers(shapes, layers)
    value, name = base != "score", architecture(config)
    labels = _labels(None if value else config.get("id2label"), options["num_labels"])
    normal = _normal(config, base, len(labels))
    options["scorer_bias"] |= normal is not None
    scoring = _rule(labels) | _reading(config)
    steps = {}
    if len(layers) > 1 and name.endswith("ForProcessRewardModel"):
        # As its authors use it: steps are separated by blank lines, and each ends with a special token.
        steps = {"step_text": "<extra_0>", "step_split": "\n\n"}
    elif len(layers) == 1 and name.endswith("ForPrmModel" if value else "ForTokenClassification"):
        steps = {"step_text": "\n"}
    appended = config.get("reward_token_id")
    if base == "v_head" and name in _APPENDS_CLS:
        appended = "cls_token"
    if value and name.endswith("ForPrmModel"):
        scoring["activation"] = "sigmoid"
    elif value and scoring["aggregation"] == "last" and appended is None:
        # A value head may score steps as well, so the caller decides.
        del scoring["aggregation"]
    unused = ("normalizer",) if base == "score_head" else ()
    return Head(options, names, scoring, steps, normal, appended, unused=unused)


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


def _normal(config: Mapping[str, Any], base: str, labels: int) -> tuple[float, float] | None:
    """Return the mean and standard deviation of rewards if scores are normalized by them (OpenRLHF, Beaver)."""
    if base == "score_head" and config.get("do_normalize") is True:
        return _beaver(config, labels)
    if not normalizes(config):
        return None
    mean, std = config["mean"], config.get("std")
    if not (_finite(mean) and _finite(std) and std > 0 and labels == 1):
        raise ConfigError(
            f"config.json, 'normalize_reward': expected numbers 'mean' and 'std' above 0, and a head of one label; "
            f"found {mean!r:.40}, {std!r:.40} and {labels} labels; set 'normalize_reward' to false for raw scores"
        )
    return float(mean), float(std)


def _beaver(config: Mapping[str, Any], labels: int) -> tuple[float, float] | None:
    """Return what safe-rlhf normalizes by: a reward by mean and variance, a cost by the variance alone."""
    kind = config.get("score_type", "reward")
    if kind == "critic":
        return None
    mean, var = (
        value[0] if isinstance(value, list) and value else value for value in (config.get("mean"), config.get("var"))
    )
    if kind not in ("reward", "cost") or not (_finite(mean) and _finite(var) and var > 0 and labels == 1):
        raise ConfigError(
            "config.json, 'do_normalize': expected 'score_type' reward, cost or critic, numbers 'mean' and 'var' above "
            f"0, and a head of one label; found {kind!r:.40}, {mean!r:.40}, {var!r:.40} and {labels} labels; set "
            "'do_normalize' to false for raw scores"
        )
    return (float(mean) if kind == "reward" else 0.0), math.sqrt(var)


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def further_text(shapes: Shapes, names: Sequence[str]) -> str:
    """Return tensors with their shapes, the first six of them."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"{', '.join(f'{name} {shapes[name]}' for name in names[:6])}{more}"


def suggestion(config: Mapping[str, Any], shapes: Shapes, further: Sequence[str]) -> str:
    """Return what to do with tensors of an unknown head, with the declaration that fits their shapes, if one does."""
    matrices = {n.removesuffix(".weight"): shapes[n] for n in further if n.endswith(".weight") and len(shapes[n]) == 2}
    layers: list[str] = []
    width = config.get("hidden_size")
    # The layer that gives one value is the last, so of several that fit the widest comes first.
    while fitting := [name for name, size in matrices.items() if name not in layers and size[1] == width]:
        layers.append(max(fitting, key=lambda name: matrices[name][0]))
        width = matrices[layers[-1]][0]
    if not layers:
        return (
            "None of them is a linear layer that reads the backbone, so bonnx cannot compute this head "
            "(docs/reward_models.md lists the supported ones)"
        )
    declared: dict[str, Any] = {"layers": layers, "read_at": "last"}
    declared |= {"activation": "relu"} if len(layers) > 1 else {}
    unused = [name for name in further if name.rpartition(".")[0] not in layers]
    declared |= {"unused": unused} if unused else {}
    return (
        "docs/reward_models.md lists the supported heads. If these tensors are linear layers, declare them: pass "
        f"--head with a JSON file such as {json.dumps(declared)}"
    )


def _no_head(config: Mapping[str, Any], shapes: Shapes, further: list[str]) -> str:
    name = architecture(config)
    declared = f"'architectures' is {name}" if name else "'architectures' is missing"
    start = f"the checkpoint has no scorer that is supported (config.json, {declared}): "
    if further:
        return (
            f"{start}besides the backbone it has {further_text(shapes, further)}. {suggestion(config, shapes, further)}"
        )
    return (
        f"{start}besides the backbone it has no tensors; expected score.weight, v_head.weight or another head that "
        "docs/reward_models.md lists. For a reranker as its makers published it, pass --reranker; for another language "
        "model that answers with a token, --label-tokens; for any other, train a scorer first, see docs/scorer.md, or "
        "pass --no-scorer for one that only generates"
    )

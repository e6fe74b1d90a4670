"""Gated heads: many objectives, weighted by a network that reads the prompt (ArmoRM: Wang et al., 2024; QRM).

The score of a position with output h is `sum_o c_o r_o`, with the objectives r = R h and the coefficients
c = M softmax(gate(h_p) / T) s, where p is the first token of the last header of an assistant's turn. QRM averages the
quantiles of each objective, applies M to the objectives instead, and has batch norms in its gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import ConfigError
from .head import Head, Shapes, layers_of

__all__ = ["HEADERS", "OBJECTIVES", "SCALE", "TRANSFORM", "GateTensors", "gated_head"]

HEADERS = {
    "llama": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma2": "<end_of_turn>\n<start_of_turn>model\n",
}
"""What the gate looks for in the tokens, by `model_type`."""

OBJECTIVES, TRANSFORM, _GATE, SCALE = (
    "regression_layer",
    "reward_transform_matrix",
    "gating.layers",
    "gating.logit_scale",
)
_HELPSTEER = [f"helpsteer-{name}" for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")]
_ULTRAFEEDBACK = ("overall_score", "instruction_following", "truthfulness", "honesty", "helpfulness")
_CODE = ("complexity", "style", "explanation", "instruction-following", "readability")
# The objectives of both models, in their order; config.json does not name them.
_NAMES = [
    *_HELPSTEER,
    *(f"ultrafeedback-{name}" for name in _ULTRAFEEDBACK),
    *("beavertails-is_safe", "prometheus-score", "argilla-overall_quality", "argilla-judge_lm"),
    *(f"code-{name}" for name in _CODE),
]


@dataclass(frozen=True)
class GateTensors:
    """Where a gated head's tensors are.

    Attributes:
        layers: names of the gate's linear layers.
        norms: for each layer the batch norm that its input went through, or None.
        quantiles: number of outputs for each objective.
        temperature: of the gate's softmax.
        transforms_objectives: whether the reported objectives are those after the transform.
        biases: names of the layers that have biases.
    """

    layers: list[str]
    norms: list[str | None]
    quantiles: int
    temperature: float
    transforms_objectives: bool
    biases: frozenset[str]


def gated_head(config: Mapping[str, Any], shapes: Shapes) -> Head | None:
    """Recognize a gated head, or return None.

    Raises:
        ConfigError: if it is one, but its tensors or fields contradict each other.
    """
    if f"{OBJECTIVES}.weight" not in shapes or not (found := layers_of(shapes, _GATE)):
        return None
    header = HEADERS.get(config.get("model_type", ""))
    if header is None:
        raise ConfigError(
            f"config.json, 'model_type': the gate of this head looks for the header of an assistant's turn, which is "
            f"known for {' and '.join(HEADERS)}; found {config.get('model_type')!r}"
        )
    norms = [name for name in found if f"{name}.running_var" in shapes]
    layers = [name for name in found if name not in norms]
    before = [next((norm for norm in norms if found.index(norm) == found.index(layer) - 1), None) for layer in layers]
    count = shapes.get(TRANSFORM, (0,))[0]
    outputs, width = shapes[f"{OBJECTIVES}.weight"]
    temperature = config.get("gating_temperature", 10)
    inner = [shapes[f"{layer}.weight"][0] for layer in layers]
    read = [shapes[f"{layer}.weight"][-1] for layer in layers]
    if not count or outputs % count or SCALE not in shapes or inner[-1:] != [count] or read != [width, *inner[:-1]]:
        raise ConfigError(
            f"the gated head's tensors do not fit together: expected {TRANSFORM} (objectives, objectives), {SCALE}, "
            f"{OBJECTIVES}.weight with as many rows or a multiple, and {_GATE} from the backbone to the objectives"
        )
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
        raise ConfigError(f"config.json, 'gating_temperature': expected a number above 0; found {temperature!r:.40}")
    biases = frozenset(layer for layer in layers if f"{layer}.bias" in shapes)
    gate = GateTensors(layers, before, outputs // count, float(temperature), "num_quantiles" in config, biases)
    options = {
        "scorer_kind": "gated",
        "scorer_activation": "relu",
        "scorer_hidden": inner[:-1],
        "scorer_bias": False,
        "num_labels": count,
    }
    scoring = {"labels": _names(config.get("id2label"), count), "aggregation": "last"}
    return Head(options, {}, scoring, gate=gate, header=header, unused=(OBJECTIVES, TRANSFORM, "gating"))


def _names(named: Any, count: int) -> list[str]:
    names = [str(name) for name in named.values()] if isinstance(named, Mapping) else []
    if len(set(names)) == count and not any(name.startswith("LABEL_") for name in names):
        return names
    return _NAMES[:count] if count in (len(_HELPSTEER), len(_NAMES)) else [f"objective_{i}" for i in range(count)]

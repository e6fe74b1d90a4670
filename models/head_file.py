"""A declaration of a head that bonnx does not know (`--head head.json`): which tensors it has, and how it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from bonnx.errors import near_miss

from .config import ConfigError
from .files import read_json
from .head import Head, Shapes, further_text, linear_layers

__all__ = ["HeadFile", "declared_head", "read_head_file"]


class HeadFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The contents of the file: score = activation of (output - mean) / (std * temperature) of the chosen label."""

    layers: list[str]
    """Names of the linear layers from the backbone to the score, without `.weight` and `.bias`."""
    activation: Literal["relu", "silu", "gelu", "tanh"] | None = None
    """Between the layers."""
    read_at: Literal["last", "steps"] = "last"
    """At the last token, or at the ends of steps."""
    append: int | str | None = None
    """Text or id of a token that ends every text, and at which the score is then read."""
    step_text: str | None = None
    step_split: str | None = None
    labels: list[str] | None = None
    """Names of the last layer's outputs, if there are several."""
    label: int | str | None = None
    """The output that is the score: its name, or its number from 0."""
    score: Literal["none", "sigmoid", "softmax"] = "none"
    """What is applied to the score; `softmax` over the labels."""
    mean: float = 0.0
    std: float = 1.0
    temperature: float = 1.0
    unused: list[str] = []
    """Tensors from which the score is not computed, by name or the part of it before a dot."""


def read_head_file(path: Path) -> HeadFile:
    """Read and check a declaration.

    Raises:
        ConfigError: if the file cannot be read, or a field is unknown or invalid.
    """
    try:
        content = read_json(path)
    except OSError as e:
        raise ConfigError(f"--head {path}: cannot be read: {e.strerror or e}") from e
    known = HeadFile.__struct_fields__
    for name in content:
        if name not in known:
            raise ConfigError(f"--head {path}: unknown field '{name}'; {near_miss(name, sorted(known))}")
    try:
        head = msgspec.convert(content, HeadFile)
    except msgspec.ValidationError as e:
        raise ConfigError(f"--head {path}: {e}") from e
    if wrong := _contradiction(head):
        raise ConfigError(f"--head {path}: {wrong}")
    return head


def _contradiction(head: HeadFile) -> str | None:
    """Return why a declaration is invalid for every checkpoint, or None."""
    if not head.layers or len(set(head.layers)) < len(head.layers):
        return f"'layers': expected names of different layers; got {head.layers}"
    if (len(head.layers) > 1) != (head.activation is not None):
        return f"'activation': expected one if there are several 'layers', and none otherwise; got {head.activation}"
    for name in ("std", "temperature"):
        if not 0 < getattr(head, name) < math.inf:
            return f"'{name}': expected a number above 0; got {getattr(head, name)}"
    for name in ("step_text", "step_split"):
        if getattr(head, name) == "":
            return f"'{name}': expected a text; got an empty one"
    if head.append is not None and head.read_at == "steps":
        return "'append': the score is read at the appended token, so 'read_at' must be 'last'"
    if head.read_at == "steps" and head.step_text is None:
        return "'read_at' is 'steps': expected 'step_text' too, the text that ends each step"
    if head.read_at == "last" and (head.step_text is not None or head.step_split is not None):
        return "'step_text' and 'step_split': expected 'read_at' to be 'steps'"
    return None


def declared_head(head: HeadFile, shapes: Shapes, further: Sequence[str], hidden: Any) -> Head:
    """Return the head that a declaration describes.

    Args:
        head: the declaration.
        shapes: the shape of every tensor, by name.
        further: names of the tensors that belong neither to the backbone nor to the vocabulary head.
        hidden: the backbone's width.

    Raises:
        ConfigError: if a tensor is missing, the shapes do not fit together, or a label does not exist.
    """
    for layer in head.layers:
        if f"{layer}.weight" not in shapes:
            present = (
                f"besides the backbone there is {further_text(shapes, further)}" if further else "there is no head"
            )
            raise ConfigError(f"--head, 'layers': the checkpoint has no tensor '{layer}.weight'; {present}")
    width = shapes[f"{head.layers[0]}.weight"][-1]
    if width != hidden:
        raise ConfigError(
            f"--head, 'layers': '{head.layers[0]}' reads {width} values; expected the backbone's {hidden} as its input"
        )
    options, names = linear_layers(shapes, head.layers, head.activation or "relu")
    count = options["num_labels"]
    labels = [f"LABEL_{i}" for i in range(count)] if head.labels is None else head.labels
    if len(labels) != count or len(set(labels)) < count:
        raise ConfigError(f"--head, 'labels': expected {count} different names, one for each output; got {labels}")
    scoring: dict[str, Any] = {"labels": labels, "activation": head.score, "label": _label(head.label, labels)}
    scoring |= {"aggregation": "last"} if head.read_at == "last" else _STEPS
    steps = {name: value for name in ("step_text", "step_split") if (value := getattr(head, name)) is not None}
    normal = (head.mean, head.std * head.temperature)
    if normal == (0.0, 1.0):
        return Head(options, names, scoring, steps, None, head.append, unused=tuple(head.unused))
    if head.score == "softmax":
        raise ConfigError("--head, 'score': softmax over labels is not supported with 'mean', 'std' or 'temperature'")
    return Head(options | {"scorer_bias": True}, names, scoring, steps, normal, head.append, unused=tuple(head.unused))


_STEPS: Mapping[str, Any] = {"aggregation": "step_last", "steps_from": "--head, 'read_at'"}


def _label(label: int | str | None, labels: Sequence[str]) -> int:
    """Return the number of the label that is the score."""
    if label is None and len(labels) == 1:
        return 0
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    if isinstance(label, int) and 0 <= label < len(labels):
        return label
    shown = ", ".join(labels[:6]) + f" and {len(labels) - 6} more" * (len(labels) > 6)
    raise ConfigError(f"--head, 'label': expected one of {shown}, or its number from 0; got {label!r}")

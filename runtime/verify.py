"""Prove an artifact on this machine: its files are as written, and it gives what PyTorch gave at export."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .checks import check_path
from .difference import greatest_difference
from .errors import ArtifactError
from .folder import locate
from .model import Model, load
from .session import Array, Provider

__all__ = ["Check", "verify"]

GOLDEN = "golden.npz"


@dataclass(frozen=True)
class Check:
    """One recorded case run again: its greatest absolute difference over all outputs, and the best indices."""

    case: str
    max_difference: float
    best_index: list[int]


def verify(path: str | os.PathLike[str], *, provider: Provider = "auto") -> tuple[Model, list[Check]]:
    """Check every hash, then run the recorded cases.

    Raises:
        ArtifactError: the artifact is not as it was written, or an output differs from the recorded one by more than
            the manifest allows.
        ProviderError: it cannot run here.
    """
    folder = check_path("path", path)
    model = load(folder, provider=provider)
    cases: dict[str, dict[str, dict[str, Array]]] = defaultdict(lambda: {"in": {}, "out": {}})
    with np.load(locate(folder, GOLDEN), allow_pickle=False) as recorded:
        for key in recorded.files:
            case, kind, name = key.rsplit("/", 2)
            cases[case][kind][name] = recorded[key]
    if not cases:
        raise ArtifactError(f"{folder / GOLDEN} holds no recorded case; export the model again")
    return model, [_run(model, case, parts["in"], parts["out"]) for case, parts in cases.items()]


def _run(model: Model, case: str, feeds: dict[str, Array], expected: dict[str, Array]) -> Check:
    allowed = model.manifest.parity[0]
    outputs = model.session(case.split("/", 1)[0]).run(feeds, list(expected))
    found = dict(zip(expected, outputs, strict=True))
    worst = 0.0
    for name in expected.keys() - {"best_index"}:
        try:
            difference = greatest_difference(found[name], expected[name], allowed.relative, allowed.absolute)
        except ValueError as e:
            raise ArtifactError(f"{case} on {model.provider}, '{name}': {e}; try another ONNX Runtime") from e
        worst = max(worst, difference)
    if not np.array_equal(expected["best_index"], found["best_index"]):
        raise ArtifactError(f"{case}: chose {found['best_index']}, recorded {expected['best_index']}")
    return Check(case, worst, found["best_index"].tolist())

"""Verify an artifact on this machine: its files are intact, and its outputs are those recorded at export."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from bonnx.errors import ArtifactError

from .arrays import Array
from .artifact.folder import locate
from .checks import check_path
from .engine.compare import maximum_difference
from .engine.engine import Engine, open_engine
from .engine.session import Provider
from .model import Model
from .results import Result

__all__ = ["Check", "verify"]

GOLDEN = "golden.npz"


@dataclass(frozen=True, eq=False, repr=False)
class Check(Result):
    """One recorded case run again: its maximum absolute difference over all outputs, and the best indices."""

    case: str
    max_difference: float
    best_index: list[int]


def verify(path: str | os.PathLike[str], *, provider: Provider = "auto") -> tuple[Model, list[Check]]:
    """Check every hash, then run the recorded cases; a single file at int8 may have none.

    Raises:
        ArtifactError: the artifact is not as it was written, or an output differs from the recorded one by more than
            was allowed at export.
        ProviderError: it cannot run here.
    """
    folder = check_path("path", path)
    engine = open_engine(folder, provider=provider)
    if engine.manifest.is_single_file and GOLDEN not in engine.manifest.files:
        # Of its one graph no case was found that every machine computes alike.
        return Model(engine, folder), []
    cases: dict[str, dict[str, dict[str, Array]]] = defaultdict(lambda: {"in": {}, "out": {}, "allowed": {}})
    with np.load(locate(folder, GOLDEN), allow_pickle=False) as recorded:
        for key in recorded.files:
            case, kind, name = key.rsplit("/", 2)
            cases[case][kind][name] = recorded[key]
    if not cases:
        raise ArtifactError(f"{folder / GOLDEN} holds no recorded case; export the model again")
    return Model(engine, folder), [
        _run(engine, case, parts["in"], parts["out"], parts["allowed"]) for case, parts in cases.items()
    ]


def _run(
    engine: Engine, case: str, feeds: dict[str, Array], expected: dict[str, Array], allowed: dict[str, Array]
) -> Check:
    outputs = engine.session(case.split("/", 1)[0]).run(feeds, list(expected))
    values = dict(zip(expected, outputs, strict=True))
    worst = 0.0
    for name, limit in allowed.items():
        try:
            difference = maximum_difference(values[name], expected[name], float(limit))
        except ValueError as e:
            raise ArtifactError(f"{case} on {engine.provider}, '{name}': {e}; try another ONNX Runtime") from e
        worst = max(worst, difference)
    # Tokens, lengths and choices are whole numbers, and the same everywhere.
    for name in expected.keys() - allowed.keys():
        if not np.array_equal(expected[name], values[name]):
            raise ArtifactError(
                f"{case} on {engine.provider}, '{name}': gave {values[name].ravel()[:8]}, recorded "
                f"{expected[name].ravel()[:8]}; try another ONNX Runtime"
            )
    return Check(case, worst, values["best_index"].tolist() if "best_index" in values else [])

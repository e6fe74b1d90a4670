"""Run every check of an exported folder, in an order that keeps peak memory low."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bonnx.models.network import LanguageModel, TwoHeadedNetwork
from bonnx.runtime.artifact.manifest import Graph, Limits, Parity, Scoring

from ..stages import Report, silent
from .cached import CachedRankings
from .generate import check_generation
from .parity import Checker, check_structure
from .selection import selection_cases
from .spill import free, spill

__all__ = ["verify_graphs"]


def verify_graphs(
    computed: LanguageModel | TwoHeadedNetwork,
    folder: Path,
    graphs: dict[str, Graph],
    scoring: Scoring,
    limits: Limits,
    seed: int,
    *,
    frugal: bool,
    quick: bool = False,
    report: Report = silent,
) -> list[Parity]:
    """Check the written graphs against PyTorch at the same precision, and record some cases for `bonnx verify`.

    Args:
        computed: the model as the graphs compute it, from `quantized`.
        folder: the artifact's folder; `golden.npz` is written into it.
        graphs: the graphs by name, with file paths relative to the folder.
        scoring: the scoring rule built into the graphs.
        limits: the maximum length of the test inputs.
        seed: seeds the random inputs.
        frugal: free the model's memory as soon as PyTorch has computed the expected outputs.
        quick: run every kind of check with fewer cases.
        report: is told what begins.

    Returns:
        One result for each check.

    Raises:
        ExportError: if a graph is not valid ONNX, or an output differs from PyTorch's by more than the tolerance.
    """
    report("checking the structure of the graphs")
    for graph in graphs.values():
        check_structure(folder / graph.file)
    checker = Checker(computed, folder, graphs, scoring, limits, seed, quick=quick)
    with _threads(checker.threads):
        parity = _run(checker, frugal, report)
    np.savez_compressed(folder / "golden.npz", **checker.recorded)  # type: ignore[arg-type]
    return parity


def _run(checker: Checker, frugal: bool, report: Report) -> list[Parity]:
    computed, scores = checker.model, checker.network.config.has_scorer
    generates = isinstance(computed, LanguageModel) and computed.config.vocabulary_head
    report("computing rows with PyTorch in float64 and in the graphs' arithmetic")
    # PyTorch has to compute what is generated, too, but needs only one layer at a time in memory.
    forget = spill(computed, checker.folder) if frugal and generates else None
    cached = CachedRankings(checker) if scores else None
    cases = [*checker.cases(), *selection_cases(checker)] if scores else []
    if forget is not None:
        forget()
    elif frugal:
        free(computed)
    report("comparing score and rank")
    parity = checker.run(cases)
    if cached is not None:
        parity.append(cached.check())
    if generates:
        parity += check_generation(checker, report)
    return parity


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Limit PyTorch's threads, if a count is given."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

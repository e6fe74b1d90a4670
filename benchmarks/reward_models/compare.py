"""Run one row: write its checkpoint, export it, and compare its scores with the reference's."""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil
import tempfile
import time
from pathlib import Path

import numpy as np

import bonnx
from bonnx.command import main as bonnx_command

from . import rows as folder_of_rows
from .row import Case, Row

__all__ = ["compare", "read_rows"]


def read_rows() -> list[Row]:
    """Return the rows of every module of `rows/`."""
    names = sorted(module.name for module in pkgutil.iter_modules(folder_of_rows.__path__))
    modules = [importlib.import_module(f"{folder_of_rows.__name__}.{name}") for name in names]
    return [row for module in modules for row in module.ROWS]


def export(folder: Path, case: Case) -> Path:
    """Run `bonnx export`, and return the artifact's folder."""
    output, messages = folder / "out", io.StringIO()
    source = str(case.checkpoint or folder / "checkpoint")
    with contextlib.redirect_stdout(messages), contextlib.redirect_stderr(messages):
        code = bonnx_command(["export", "--checkpoint", source, "-o", str(output), *case.arguments])
    if code:
        raise SystemExit(messages.getvalue())
    return output


def compare(number: int, seed: int) -> tuple[float, bool, float]:
    """Export a row's checkpoint and run its checks.

    Returns:
        the largest difference from the reference, relative to the largest score of a check (a score near 0 has digits
        of rounding only), whether the winner is the same everywhere, and seconds.
    """
    start, worst, same = time.perf_counter(), 0.0, True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = read_rows()[number].build(folder / "checkpoint", np.random.default_rng(seed))
        with contextlib.closing(bonnx.load(export(folder, case))) as model:
            for check in case.checks:
                if check.prompt is None:
                    scores = model.score(check.candidates, **check.options).row_scores
                else:
                    scores = model.rank(check.prompt, check.candidates, **check.options).candidate_scores
                difference = np.max(np.abs(scores - check.expected))
                worst = max(worst, float(difference / np.max(np.abs(check.expected))))
                same &= int(np.argmax(scores)) == int(np.argmax(check.expected))
    return worst, same, time.perf_counter() - start

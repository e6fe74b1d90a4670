"""Print the table."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import pkgutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import bonnx
from bonnx.command import main as bonnx_command

from . import __doc__ as description
from . import rows
from .row import ALLOWED, Case, Row


def read_rows() -> list[Row]:
    """Return the rows of every module of `rows/`."""
    names = sorted(module.name for module in pkgutil.iter_modules(rows.__path__))
    modules = [importlib.import_module(f"{rows.__name__}.{name}") for name in names]
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


def compare(row: Row, seed: int) -> tuple[float, bool]:
    """Export a row's checkpoint and run its checks.

    Returns:
        the largest relative difference from the reference, and whether the winner is the same everywhere.
    """
    worst, same = 0.0, True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = row.build(folder / "checkpoint", np.random.default_rng(seed))
        with contextlib.closing(bonnx.load(export(folder, case))) as model:
            for check in case.checks:
                if check.prompt is None:
                    scores = model.score(check.candidates, **check.options).row_scores
                else:
                    scores = model.rank(check.prompt, check.candidates, **check.options).candidate_scores
                # Random checkpoints give scores near 0, so the largest score of the ranking is the scale.
                worst = max(worst, float(np.max(np.abs(scores - check.expected)) / np.max(np.abs(check.expected))))
                same &= int(np.argmax(scores)) == int(np.argmax(check.expected))
    return worst, same


def main() -> int:
    """Print a line for each row; 1 if one differs by more than is allowed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", metavar="NAME", help="only the rows whose model or head contains this")
    parser.add_argument("--seed", type=int, default=0, help="of the random checkpoints (default: %(default)s)")
    arguments = parser.parse_args()
    wanted = (arguments.only or "").lower()
    chosen = [row for row in read_rows() if wanted in row.model.lower() or wanted in row.head.lower()]
    if not chosen:
        parser.error(
            f"no model or head contains {arguments.only!r}; the models: {', '.join(r.model for r in read_rows())}"
        )
    wrong = 0
    print("| model | head | reference | relative difference | same winner |\n|---|---|---|---|---|")
    for row in chosen:
        start = time.perf_counter()
        difference, same = compare(row, arguments.seed)
        wrong += not (same and difference <= ALLOWED)
        print(
            f"| {row.model} | {row.head} | {row.reference} | {difference:.1e} | {'yes' if same else 'NO'} |", flush=True
        )
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if wrong:
        print(f"{wrong} of {len(chosen)} rows differ by more than {ALLOWED:g}, or in their winner", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

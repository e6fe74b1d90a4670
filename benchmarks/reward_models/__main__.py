"""Print the table."""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.record import add_output, record

from . import __doc__ as description
from .compare import compare, read_rows
from .row import ALLOWED


def main() -> int:
    """Print a line for each row; 1 if one differs by more than is allowed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", metavar="NAME", help="only the rows whose model or head contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random checkpoints (default: %(default)s)")
    add_output(parser)
    arguments = parser.parse_args()
    rows, wanted = read_rows(), (arguments.only or "").lower()
    chosen = [i for i, row in enumerate(rows) if wanted in row.model.lower() or wanted in row.head.lower()]
    if not chosen:
        parser.error(
            f"no model or head contains {arguments.only!r}; the models: {', '.join(row.model for row in rows)}"
        )
    # Several rows at a time use the cores better than the threads of one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wrong, figures = 0, []
    print("| model | head | reference | relative difference | same winner |\n|---|---|---|---|---|", flush=True)
    with ProcessPoolExecutor(min(arguments.jobs, len(chosen)), get_context("spawn")) as pool:
        results = pool.map(compare, chosen, [arguments.seed] * len(chosen))
        for row, (difference, same, seconds) in zip([rows[i] for i in chosen], results, strict=True):
            wrong += not (same and difference <= ALLOWED)
            shown = f"{difference:.1e} | {'yes' if same else 'NO'}"
            print(f"| {row.model} | {row.head} | {row.reference} | {shown} |", flush=True)
            print(f"{seconds:.0f} s", file=sys.stderr)
            figure = {"model": row.model, "head": row.head, "reference": row.reference}
            figures.append(figure | {"relative_difference": float(difference), "same_winner": bool(same)})
    record("reward_models", figures, path=arguments.output)
    if wrong:
        print(f"{wrong} of {len(chosen)} rows differ by more than {ALLOWED:g}, or in their winner", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

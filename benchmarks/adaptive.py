"""Countdown accuracy against tokens, best of N from a server: fixed numbers of completions, and adaptive ones.

`python -m benchmarks.adaptive artifacts/countdown` serves the artifact with `bonnx serve`; `bonnx.BestOfN` samples from
that server and chooses by the scorer of the same artifact. Every setting solves the same held-out puzzles. Tokens are
those that the server counts in `usage`.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import bonnx
from benchmarks.loading import free_port, server
from benchmarks.record import add_output, record
from bonnx.models.countdown.puzzle import Puzzle, check, draw_puzzles


@dataclass(frozen=True)
class Setting:
    """A number of completions; with a batch the maximum, which a price of one completion ends early."""

    n: int
    batch: int | None = None
    price: float | None = None

    def __str__(self) -> str:
        return f"{self.n} completions" if self.batch is None else f"adaptive, batch {self.batch}, price {self.price:g}"


def settings(n: int, batches: list[int], prices: list[float]) -> list[Setting]:
    """All of them; the first is what the others are compared with."""
    fixed = [Setting(count) for count in (n, n // 2, n // 4)]
    return fixed + [Setting(n, batch, price) for batch in batches for price in prices]


def solve(best_of_n: bonnx.BestOfN, puzzles: list[Puzzle], setting: Setting) -> NDArray[np.float64]:
    """Whether each puzzle is solved, its completion tokens, and its completions: (puzzles, 3)."""
    chosen = {} if setting.batch is None else {"method": "adaptive", "batch": setting.batch, "price": setting.price}
    rows = []
    for number, puzzle in enumerate(puzzles):
        result = best_of_n.run(puzzle.prompt, setting.n, sampling={"seed": 1000 * number}, **chosen)
        assert not result.failures
        assert result.completion_tokens is not None
        rows.append((check(puzzle, result.best.text), result.completion_tokens, len(result.completions)))
    return np.array(rows, np.float64)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("-n", type=int, default=16, help="maximum of completions per puzzle (default: %(default)s)")
    parser.add_argument("--puzzles", type=int, default=600, help="half of 3 numbers, half of 4 (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--prices", type=float, nargs="+", default=[0.01, 0.02])
    parser.add_argument("--seed", type=int, default=1)
    add_output(parser)
    arguments = parser.parse_args()
    rng, half = random.Random(arguments.seed), arguments.puzzles // 2
    puzzles = [puzzle for count in (3, 4) for puzzle, _ in draw_puzzles(rng, count, half, test=True)]
    port = free_port()
    # Without --best-of 1 the server would choose among completions itself.
    command = ["-m", "bonnx", "serve", str(arguments.artifact), "--port", str(port), "--best-of", "1"]
    command += ["--threads", "1"]
    print("| | solved, % | difference, points | completions of a puzzle | tokens of a puzzle | fewer tokens, % |")
    print("|---|---|---|---|---|---|")
    base: NDArray[np.float64] | None = None
    with server(command, port, "/health"), bonnx.Upstream(f"http://127.0.0.1:{port}/v1") as upstream:
        best_of_n = bonnx.BestOfN(bonnx.load(arguments.artifact, threads=1), upstream)
        for setting in settings(arguments.n, arguments.batches, arguments.prices):
            rows = solve(best_of_n, puzzles, setting)
            base = rows if base is None else base
            difference = rows[:, 0] - base[:, 0]
            spread = 196 * difference.std(ddof=1) / np.sqrt(len(puzzles))
            solved, tokens, completions = rows.mean(0)
            cells = [str(setting), f"{100 * solved:.1f}", f"{100 * difference.mean():+.1f} ± {spread:.1f}"]
            cells += [f"{completions:.1f}", f"{tokens:.0f}", f"{100 * (1 - tokens / base[:, 1].mean()):.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
            means = dict(zip(("solved", "tokens", "completions"), map(float, rows.mean(0)), strict=True))
            record("adaptive", [{"way": str(setting), "puzzles": len(puzzles), **means}], path=arguments.output)


if __name__ == "__main__":
    main()

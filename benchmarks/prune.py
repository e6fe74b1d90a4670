"""Countdown accuracy against tokens computed, pruned or with fewer candidates: `python -m benchmarks.prune ARTIFACT`.

Every setting solves the same held-out puzzles with the same seed, so a candidate that is not pruned is the same in all.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np

import bonnx
from bonnx.models.countdown.puzzle import check, draw_puzzles

from .record import add_output, record

# The share of the candidates that is started, the number of tokens between prunings (0: never), and the share kept by
# each. A step of a solution has 6 tokens.
SETTINGS = [(1.0, 0, 1.0), (0.875, 0, 1.0), (0.75, 0, 1.0), (0.5, 0, 1.0)]
SETTINGS += [(1.0, 12, 0.5), (1.0, 12, 0.25), (1.0, 6, 0.75), (1.0, 6, 0.5), (1.0, 6, 0.25)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("-n", type=int, default=16, help="candidates per puzzle (default: %(default)s)")
    parser.add_argument("--puzzles", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    add_output(parser)
    arguments = parser.parse_args()
    rng, half = random.Random(arguments.seed), arguments.puzzles // 2
    puzzles = [puzzle for count in (3, 4) for puzzle, _ in draw_puzzles(rng, count, half, test=True)]
    model = bonnx.load(arguments.artifact)
    print(f"{len(puzzles)} held-out puzzles, {arguments.n} candidates; 95% interval of the difference, same puzzles\n")
    print("   n  prune_every  prune_keep  solved, %  difference          tokens computed")
    base: list[bool] = []
    all_tokens = 0
    for share, every, keep in SETTINGS:
        right, tokens, count = [], 0, round(share * arguments.n)
        for puzzle in puzzles:
            result = model.generate(puzzle.prompt, n=count, seed=arguments.seed, prune_every=every, prune_keep=keep)
            right.append(check(puzzle, str(result.best.text)))
            tokens += result.computed_tokens
        base, all_tokens = base or right, all_tokens or tokens
        difference = np.array(right, float) - np.array(base, float)
        spread = 196 * difference.std(ddof=1) / np.sqrt(len(difference))
        text = f"{100 * difference.mean():+5.1f} +- {spread:3.1f} points"
        solved = f"{100 * np.mean(right):>9.1f}"
        setting = {"n": count, "prune_every": every, "prune_keep": keep, "puzzles": len(puzzles)}
        record("prune", [setting | {"solved": float(np.mean(right)), "tokens": tokens}], path=arguments.output)
        print(f"  {count:>2}  {every:>11}  {keep:>10}  {solved}  {text}  {100 * tokens / all_tokens:5.1f}%", flush=True)


if __name__ == "__main__":
    main()

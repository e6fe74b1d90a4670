"""Measure best-of-N: `python -m bonnx.models.countdown.evaluate` writes the recipe's report.

Held-out puzzles share no (numbers, target) with training. Each gets `samples` completions. Best-of-N for a smaller N is
the mean over disjoint groups of N, so that every completion counts once. Intervals are 95% bootstrap intervals over
puzzles.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from ..checkpoint import load_checkpoint
from ..decoding import sample
from ..network import LanguageModel
from . import CHECKPOINT
from .puzzle import check, draw_puzzles
from .train import MAX_NEW_TOKENS
from .vocabulary import END, PAD, decode, encode

__all__ = ["best_of", "calibration", "evaluate", "main"]

METHODS = ("one sample", "best-of-N by the scorer", "majority vote", "oracle")


def sample_and_score(
    model: LanguageModel, prompt: str, samples: int, seed: int
) -> tuple[list[str], NDArray[np.float32]]:
    """Sample completions of one prompt; return them and the scorer's probability at each last token (samples,)."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.tensor([encode(prompt)]).expand(samples, -1)
    completions = sample(model, prompts, MAX_NEW_TOKENS, END, PAD, generator)
    with torch.no_grad():
        scores = model(torch.cat([prompts, completions], 1))[1][..., 0].sigmoid()
    lengths = (completions != PAD).sum(1)
    last = scores[torch.arange(samples), prompts.shape[1] + lengths - 1]
    texts = [decode(row[:length]) for row, length in zip(completions.tolist(), lengths.tolist(), strict=True)]
    return texts, last.numpy()


def best_of(count: int, texts: list[str], scores: NDArray[np.float32], right: NDArray[np.bool_]) -> list[float]:
    """Return how often each of `METHODS` is right for one puzzle, over disjoint groups of `count` completions."""
    solved = np.zeros(len(METHODS))
    groups = [slice(i, i + count) for i in range(0, len(texts) - count + 1, count)]
    for group in groups:
        # Counter keeps the order of first occurrence, so ties go to the earliest completion.
        vote = Counter(texts[group]).most_common(1)[0][0]
        chosen = int(scores[group].argmax())
        solved += [
            right[group].mean(),
            right[group][chosen],
            right[group][texts[group].index(vote)],
            right[group].any(),
        ]
    return [float(value) for value in solved / len(groups)]


def calibration(scores: NDArray[np.float64], right: NDArray[np.bool_], bins: int = 10) -> dict[str, Any]:
    """Return the reliability of probabilities (n,) in equal bins, and their calibration error (Guo et al., 2017)."""
    place = np.minimum((scores * bins).astype(int), bins - 1)
    rows = [
        (float(scores[place == b].mean()), float(right[place == b].mean()), int((place == b).sum()))
        for b in range(bins)
        if (place == b).any()
    ]
    error = sum(abs(predicted - true) * n for predicted, true, n in rows) / len(scores)
    return {"bins": rows, "expected_calibration_error": error}


def evaluate(model: LanguageModel, puzzles: int = 600, samples: int = 64, seed: int = 0) -> dict[str, Any]:
    """Measure accuracy for N = 1, 2, 4, ... `samples` on held-out puzzles, half of 3 numbers and half of 4."""
    rng = random.Random(f"evaluate {seed}")
    drawn: dict[str, Any] = {}
    for count in (3, 4):
        while len(drawn) < puzzles * (count - 2) // 2:
            ((puzzle, _),) = draw_puzzles(rng, count, 1, test=True)
            drawn[puzzle.prompt] = puzzle
    counts = [2**i for i in range(samples.bit_length())]
    values = np.zeros((len(drawn), len(counts), len(METHODS)))
    all_scores, all_right = [], []
    for i, (prompt, puzzle) in enumerate(track(drawn.items(), description="evaluating", total=len(drawn))):
        texts, scores = sample_and_score(model, prompt, samples, seed * 1_000_003 + i)
        right = np.array([check(puzzle, text) for text in texts])
        values[i] = [best_of(count, texts, scores, right) for count in counts]
        all_scores.append(scores)
        all_right.append(right)
    resampled = np.random.default_rng(seed).integers(len(drawn), size=(2000, len(drawn)))
    means = np.stack([values[rows].mean(0) for rows in resampled])
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    rows = [
        {"n": n, "method": method, "accuracy": values[:, i, m].mean(), "low": low[i, m], "high": high[i, m]}
        for i, n in enumerate(counts)
        for m, method in enumerate(METHODS)
    ]
    reliability = calibration(np.concatenate(all_scores).astype(np.float64), np.concatenate(all_right))
    return {"puzzles": len(drawn), "samples": samples, "seed": seed, "accuracy": rows, "calibration": reliability}


def report(result: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    cells = {(row["n"], row["method"]): row for row in result["accuracy"]}
    lines = [
        "# Countdown: results of best-of-N",
        "",
        f"{result['puzzles']} held-out puzzles (no numbers with the same target in training), half of 3 numbers, half "
        f"of 4, {result['samples']} samples each at temperature 1. Per cent right, with 95% intervals over puzzles.",
        "",
        f"| N | {' | '.join(METHODS)} |",
        f"|---|{'---|' * len(METHODS)}",
    ]
    for n in sorted({row["n"] for row in result["accuracy"]}):
        row = [cells[n, method] for method in METHODS]
        text = " | ".join(f"{100 * c['accuracy']:.1f} ({100 * c['low']:.1f} to {100 * c['high']:.1f})" for c in row)
        lines.append(f"| {n} | {text} |")
    error = result["calibration"]["expected_calibration_error"]
    lines += [
        "",
        "Majority vote counts equal texts. The oracle is right if any of the N completions is.",
        "",
        f"Expected calibration error of the score at the last position: {error:.3f}.",
        "",
        "| mean score | share right | completions |",
        "|---|---|---|",
        *(f"| {predicted:.3f} | {true:.3f} | {n} |" for predicted, true, n in result["calibration"]["bins"]),
        "",
        "![accuracy against N, and reliability of the score](report.png)",
        "",
        "Made by `python -m bonnx.models.countdown.evaluate`; weights by `python -m bonnx.models.countdown.train "
        "--output FOLDER`.",
    ]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the report's figure: accuracy against N, and the reliability of the score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    for method, colour in zip(METHODS, ("#888888", "#0b6e99", "#d08700", "#2e7d32"), strict=True):
        rows = [row for row in result["accuracy"] if row["method"] == method]
        n = [row["n"] for row in rows]
        left.plot(n, [100 * row["accuracy"] for row in rows], marker="o", color=colour, label=method)
        left.fill_between(n, [100 * r["low"] for r in rows], [100 * r["high"] for r in rows], color=colour, alpha=0.15)
    left.set_xscale("log", base=2)
    left.set_xticks(n, [str(value) for value in n])
    left.set(xlabel="N completions", ylabel="puzzles solved, %", ylim=(0, 100), title="Held-out Countdown puzzles")
    left.legend(loc="lower right")
    predicted, true, count = zip(*result["calibration"]["bins"], strict=True)
    right.plot([0, 1], [0, 1], color="#bbbbbb", linestyle="--", label="perfect")
    right.plot(predicted, true, marker="o", color="#0b6e99", label="scorer, last position")
    for x, y, c in zip(predicted, true, count, strict=True):
        right.annotate(f"{c}", (x, y), textcoords="offset points", xytext=(5, -11), fontsize=7, color="#555555")
    right.set(xlabel="score", ylabel="share that is right", title="Reliability (labels: completions)")
    right.legend(loc="upper left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Run the evaluation from the command line."""
    parser = argparse.ArgumentParser(description="Write report.md, report.json and report.png of the Countdown model.")
    parser.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, help="the checkpoint's folder (default: the included model)"
    )
    parser.add_argument("-o", "--output", type=Path, help="folder of the report (default: the checkpoint's folder)")
    parser.add_argument("--puzzles", type=int, default=600, help="held-out puzzles (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="completions per puzzle (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    arguments = parser.parse_args()
    model, _ = load_checkpoint(arguments.checkpoint)
    assert isinstance(model, LanguageModel)
    result = evaluate(model, arguments.puzzles, arguments.samples, arguments.seed)
    output = arguments.output or arguments.checkpoint
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (output / "report.md").write_text(report(result), encoding="utf-8")
    draw(result, output / "report.png")
    print(report(result))


if __name__ == "__main__":
    main()

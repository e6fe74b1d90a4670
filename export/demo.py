"""The demonstration of `python export.py`: the artifact solves held-out puzzles with ONNX Runtime alone."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bonnx.models.countdown.puzzle import Puzzle, check, draw_puzzles
from bonnx.runtime.model import load

__all__ = ["demonstrate", "draw_prompts", "show"]

PUZZLES, CANDIDATES = 100, 16


def demonstrate(artifact: Path, seed: int = 0) -> dict[str, Any]:
    """Let the artifact sample and select candidates for held-out puzzles, and count the correct ones."""
    puzzles = _draw(seed, PUZZLES)
    # The products of this small model gain nothing from a second thread.
    model = load(artifact, threads=1)
    right, shown, spent = Counter[str](), None, 0.0
    for puzzle in puzzles:
        start = time.perf_counter()
        result = model.generate(puzzle.prompt, n=CANDIDATES, seed=seed)
        spent += time.perf_counter() - start
        texts = [str(candidate.text) for candidate in result.candidates]
        vote = Counter(texts).most_common(1)[0][0]
        correct = [check(puzzle, text) for text in texts]
        right["first"] += correct[0]
        right["majority"] += check(puzzle, vote)
        right["selected"] += correct[result.best_index]
        right["any"] += any(correct)
        # Show a hard puzzle: few candidates are right, and the first is not one of them.
        if 0 < sum(correct) <= CANDIDATES // 4 and not correct[0] and len(puzzle.numbers) == 4:
            scores = [candidate.score for candidate in result.candidates]
            shown = shown or _in_full(puzzle.prompt, texts, correct, scores, result.best_index)
    return {
        "puzzles": len(puzzles),
        "candidates": CANDIDATES,
        "right": {name: right[name] for name in ("first", "majority", "selected", "any")},
        "provider": model.provider,
        "milliseconds_per_puzzle": round(1000 * spent / len(puzzles), 2),
        "puzzle": shown,
    }


def draw_prompts(seed: int | str, count: int) -> list[str]:
    """Draw prompts of puzzles that are not in the training set."""
    return [puzzle.prompt for puzzle in _draw(seed, count)]


def _draw(seed: int | str, count: int) -> list[Puzzle]:
    """Draw held-out puzzles, half of 3 numbers and half of 4."""
    return [p for size in (3, 4) for p, _ in draw_puzzles(random.Random(seed), size, count // 2, test=True)]


def _in_full(prompt: str, texts: list[str], correct: list[bool], scores: list[float], best: int) -> dict[str, Any]:
    rows = [{"candidate": t, "score": s, "right": r} for t, s, r in zip(texts, scores, correct, strict=True)]
    return {"prompt": prompt, "best_index": best, "candidates": rows}


def show(result: dict[str, Any]) -> None:
    """Print the results of the demonstration."""
    total, right = result["puzzles"], result["right"]
    sizes = f"{total} held-out puzzles, {result['candidates']} candidates each"
    print(f"\n{sizes}, sampled, scored and selected by ONNX Runtime alone")
    print(f"({result['provider']}, one thread, {result['milliseconds_per_puzzle']} ms per puzzle). Puzzles solved by\n")
    names = {"first": "the first candidate", "majority": "majority vote", "selected": "best-of-N in the graph"}
    for name, text in {**names, "any": "any candidate (the limit)"}.items():
        print(f"  {text:<26} {right[name]:>3} {'#' * round(50 * right[name] / total)}")
    puzzle = result["puzzle"]
    if puzzle is None:
        return
    print(f"\nOne puzzle in full, {puzzle['prompt']}\n")
    for i, row in enumerate(puzzle["candidates"]):
        mark = "  <- selected" if i == puzzle["best_index"] else ""
        print(f"  {row['score']:8.5f}  {'right' if row['right'] else 'wrong'}  {row['candidate']}{mark}")

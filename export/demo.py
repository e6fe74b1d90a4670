"""What `python export.py` shows: sampled candidates of held-out puzzles, ranked by ONNX Runtime alone."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..models.countdown.puzzle import check
from ..models.countdown.train import MAX_NEW_TOKENS, draw_puzzles
from ..models.countdown.vocabulary import END, PAD, decode, encode
from ..models.decoding import sample
from ..models.network import LanguageModel, TwoHeadedNetwork
from ..runtime.model import load

__all__ = ["demonstrate", "show"]

PUZZLES, CANDIDATES = 100, 16


def demonstrate(model: LanguageModel | TwoHeadedNetwork, artifact: Path, seed: int = 0) -> dict[str, Any]:
    """PyTorch samples candidates for held-out puzzles; the artifact ranks them; the exact checker counts."""
    assert isinstance(model, LanguageModel)
    puzzles = [p for count in (3, 4) for p, _ in draw_puzzles(random.Random(seed), count, PUZZLES // 2, test=True)]
    generator = torch.Generator().manual_seed(seed)
    # Token ids, because two numbers that a malformed sample sets side by side would be read as one.
    candidates: list[list[list[int]]] = []
    for group in (puzzles[: PUZZLES // 2], puzzles[PUZZLES // 2 :]):
        prompts = torch.tensor([encode(p.prompt) for p in group]).repeat_interleave(CANDIDATES, 0)
        rows = sample(model, prompts, MAX_NEW_TOKENS, END, PAD, generator).tolist()
        rows = [[token for token in row if token != PAD] for row in rows]
        candidates += [rows[i : i + CANDIDATES] for i in range(0, len(rows), CANDIDATES)]
    runtime = load(artifact)
    right, shown, spent = Counter[str](), None, 0.0
    for puzzle, ids in zip(puzzles, candidates, strict=True):
        start = time.perf_counter()
        ranking = runtime.rank(puzzle.prompt, ids)
        spent += time.perf_counter() - start
        texts = [decode(row).removesuffix("\n") for row in ids]
        vote = Counter(texts).most_common(1)[0][0]
        correct = [check(puzzle, text) for text in texts]
        right["first"] += correct[0]
        right["majority"] += check(puzzle, vote)
        right["selected"] += correct[ranking.best_index]
        right["any"] += any(correct)
        # A hard one tells the most: few are right, the first is not, and the choice is not obvious.
        if 0 < sum(correct) <= CANDIDATES // 4 and not correct[0] and len(puzzle.numbers) == 4:
            shown = shown or _in_full(
                puzzle.prompt, texts, correct, ranking.candidate_scores.tolist(), ranking.best_index
            )
    return {
        "puzzles": len(puzzles),
        "candidates": CANDIDATES,
        "right": {name: right[name] for name in ("first", "majority", "selected", "any")},
        "provider": runtime.provider,
        "milliseconds_per_rank": round(1000 * spent / len(puzzles), 2),
        "puzzle": shown,
    }


def _in_full(prompt: str, texts: list[str], correct: list[bool], scores: list[float], best: int) -> dict[str, Any]:
    rows = [{"candidate": t, "score": s, "right": r} for t, s, r in zip(texts, scores, correct, strict=True)]
    return {"prompt": prompt, "best_index": best, "candidates": rows}


def show(result: dict[str, Any]) -> None:
    """The demonstration for people."""
    total, right = result["puzzles"], result["right"]
    print(f"\n{total} held-out puzzles, {result['candidates']} sampled candidates each, ranked by ONNX Runtime alone")
    print(f"({result['provider']}, {result['milliseconds_per_rank']} ms a puzzle). Puzzles solved by\n")
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

"""The tasks to compute: one model on one puzzle each, independent of all others."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import bonnx
from bonnx.models.countdown.puzzle import Puzzle, answer, check, draw_puzzles
from bonnx.models.countdown.train import MAX_NEW_TOKENS
from bonnx.models.countdown.vocabulary import STEP
from bonnx.runtime.generate.options import check_options
from bonnx.runtime.generate.result import FINISH_REASONS
from bonnx.runtime.search.artifact_tree import ArtifactTree

__all__ = ["BUDGETS", "CHAINS", "METHODS", "POOL", "PRUNED", "Task", "compute", "plan", "puzzles"]

Task = tuple[str, str, int]

BUDGETS = (4, 16, 64, 256)
# Number of samples from which every method without a search is computed, and of others that only estimate difficulty.
POOL, PROBE = 256, 64
# Number of seeds of a search by budget: more where it is cheap.
REPEATS = {4: 4, 16: 2, 64: 1, 256: 1}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "beam, M = 4": ("beam", {"width": 4}),
    "beam, M = sqrt N": ("beam", {"width": "sqrt"}),
    "lookahead, k = 1": ("lookahead", {"width": "sqrt", "steps": 1}),
    "lookahead, k = 3": ("lookahead", {"width": "sqrt", "steps": 3}),
    "DVTS, M = 4": ("dvts", {"width": 4}),
}
PRUNED = "pruned to half every 12 tokens"
CHAINS = (1, 2, 4, 8, 16, 32)
ATTEMPTS = 32


def puzzles(count: int) -> list[Puzzle]:
    """Draw held-out puzzles of 4 numbers; of those of 3, the included model solves too many."""
    drawn: dict[str, Puzzle] = {}
    rng = random.Random("miniature")
    while len(drawn) < count:
        ((puzzle, _),) = draw_puzzles(rng, 4, 1, test=True)
        drawn.setdefault(puzzle.prompt, puzzle)
    return list(drawn.values())


def plan(count: int) -> list[Task]:
    """Return every task for the first puzzles, in the order in which the figures need them."""
    kinds = [("shipped", "pool"), *(("shipped", method) for method in METHODS), ("shipped", PRUNED)]
    kinds += [("shipped", "greedy")]
    kinds += [(model, kind) for model in ("small", "small_outcome") for kind in ("pool", "beam, M = 4")]
    tasks = [(model, kind, i) for i in range(count) for model, kind in kinds]
    return tasks + [("revise", "chains", i) for i in range(count // 2)]


_MODELS: dict[tuple[Path, str], bonnx.Model] = {}


def compute(artifacts: Path, task: Task, puzzle: Puzzle) -> dict[str, Any]:
    """Compute one task with one thread; called in a worker process."""
    name, kind, _ = task
    if (artifacts, name) not in _MODELS:
        os.nice(5)
        _MODELS[artifacts, name] = bonnx.load(artifacts / name, provider="cpu", threads=1)
    model = _MODELS[artifacts, name]
    run: Callable[[bonnx.Model, Puzzle], dict[str, Any]]
    run = {"pool": _pool, "greedy": _greedy, "chains": _chains, PRUNED: _pruned}.get(kind) or _search(kind)
    return run(model, puzzle)


def _pool(model: bonnx.Model, puzzle: Puzzle) -> dict[str, Any]:
    """Draw samples, with everything that any method needs."""
    pool, probe = _sample(model, puzzle, POOL, seed=1), _sample(model, puzzle, PROBE, seed=2)
    return {**pool, "probe_right": probe["right"], "probe_score": probe["score"], "probe_tokens": probe["tokens"]}


def _sample(model: bonnx.Model, puzzle: Puzzle, count: int, seed: int) -> dict[str, Any]:
    engine = model._engine
    ids, stops = engine.reader.prompt(puzzle.prompt), engine.reader.stops(None, engine.manifest.scoring)
    options = check_options({"n": count, "seed": seed, "max_new_tokens": MAX_NEW_TOKENS}, stops, "last", MAX_NEW_TOKENS)
    tree = ArtifactTree(engine, ids, options, with_certainty=True)
    branches = tree.roots(count)
    tree.grow(branches, whole=True)
    assert engine.reader.tokenizer is not None
    reasons = [FINISH_REASONS[branch.reason] for branch in branches]
    texts = [
        engine.reader.tokenizer.decode(branch.tokens, ids.tolist(), reason)
        for branch, reason in zip(branches, reasons, strict=True)
    ]
    # The scores at the ends of steps.
    steps = [[s for t, s in zip(b.tokens, b.scores, strict=True) if t == STEP] for b in branches]
    return {
        "right": [int(check(puzzle, text)) for text in texts],
        "answers": _numbered([answer(text) for text in texts]),
        "score": [round(branch.scores[-1], 5) for branch in branches],
        "steps": [[round(score, 4) for score in scores] for scores in steps],
        "certainty": [round(float(np.mean(branch.certainties)), 4) for branch in branches],
        "tokens": [len(branch.tokens) for branch in branches],
    }


def _numbered(answers: list[str | None]) -> list[int]:
    numbers: dict[str, int] = {}
    return [-1 if a is None else numbers.setdefault(a, len(numbers)) for a in answers]


def _search(kind: str) -> Callable[[bonnx.Model, Puzzle], dict[str, Any]]:
    method, options = METHODS[kind]

    def run(model: bonnx.Model, puzzle: Puzzle) -> dict[str, Any]:
        runs: dict[str, list[Any]] = {}
        for budget in BUDGETS:
            if method == "lookahead" and budget < options["steps"] + 1:
                continue
            for seed in range(REPEATS[budget]):
                result = model.search(
                    puzzle.prompt, method, budget, answers=answer, seed=10 + seed, **_SHORT, **options
                )
                by_score = max(range(len(result.candidates)), key=lambda i: result.candidates[i].score)
                runs.setdefault(str(budget), []).append(
                    [
                        int(check(puzzle, str(result.best.text))),
                        int(check(puzzle, str(result.candidates[by_score].text))),
                        result.cost.sampled_tokens,
                        int(any(check(puzzle, str(c.text)) for c in result.candidates)),
                    ]
                )
        return runs

    return run


_SHORT: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS}


def _pruned(model: bonnx.Model, puzzle: Puzzle) -> dict[str, Any]:
    runs = {}
    for budget in BUDGETS:
        result = model.search(puzzle.prompt, "pruned", budget, seed=1, every=12, keep=0.5, **_SHORT)
        runs[str(budget)] = [[int(check(puzzle, str(result.best.text))), result.cost.sampled_tokens]]
    return runs


def _greedy(model: bonnx.Model, puzzle: Puzzle) -> dict[str, Any]:
    result = model.generate(puzzle.prompt, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
    return {"right": int(check(puzzle, str(result.best.text)))}


def _chains(model: bonnx.Model, puzzle: Puzzle) -> dict[str, Any]:
    """Split the attempts into chains; return correctness by score, by weighted vote, and of each attempt."""
    runs = {}
    for chains in CHAINS:
        result = model.search(
            puzzle.prompt, "revisions", ATTEMPTS, answers=answer, chains=chains, seed=3, memory=4, **_SHORT
        )
        right = [int(check(puzzle, str(candidate.text))) for candidate in result.candidates]
        by_score = max(range(ATTEMPTS), key=lambda i: result.candidates[i].score)
        cost = [result.cost.sampled_tokens, result.cost.prompt_tokens]
        runs[str(chains)] = {
            "weighted": right[result.best_index], "score": right[by_score], "right": right, "cost": cost
        }  # fmt: skip
    return runs

"""Figures and tables from stored results: nothing is sampled here, and every interval is a bootstrap over puzzles."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from bonnx.runtime.artifact.folder import read_verified
from bonnx.runtime.report import Figure
from bonnx.runtime.report.curves import plot
from bonnx.runtime.search import Choice, Policy, cross_validated, fit_policy, quantile_bins
from bonnx.runtime.search.sampling import SelfCertainty, borda

from .work import BUDGETS, CHAINS, METHODS, POOL, PRUNED

__all__ = ["draw", "table"]

Array = NDArray[np.float64]
BINS = ["1 (easiest)", "2", "3", "4", "5 (hardest)"]
# Completions whose mean score says how hard a prompt is, where their cost is counted.
FEW = 4
_PICTURE = ("methods", "search", "saving", "optimal")
# Of one more completion, in units of the score.
PRICES = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
_AGGREGATIONS: dict[str, Callable[[Sequence[float], float], float]] = {
    "last": lambda steps, last: last,
    "min": lambda steps, last: min([*steps, last]),
    "prod": lambda steps, last: float(np.prod([*steps, last])),
    "mean": lambda steps, last: float(np.mean([*steps, last])),
}


@dataclass
class Pool:
    """The samples of a model: (puzzles, samples) each."""

    right: NDArray[np.bool_]
    answers: NDArray[np.int64]
    score: Array
    certainty: Array
    tokens: Array
    steps: list[list[list[float]]]
    probe_right: Array
    probe_score: Array
    probe_tokens: Array

    @classmethod
    def read(cls, results: Mapping[str, Any], model: str) -> Pool:
        """All puzzles from the first that have their samples."""
        rows = []
        while f"{model}/pool/{len(rows)}" in results:
            rows.append(results[f"{model}/pool/{len(rows)}"])
        arrays = {key: np.array([row[key] for row in rows]) for key in rows[0] if key != "steps"}
        arrays["right"] = arrays["right"].astype(bool)
        return cls(**arrays, steps=[row["steps"] for row in rows])

    def aggregated(self, name: str) -> Array:
        """Another score of each sample, from the scores at its steps' ends."""
        rule = _AGGREGATIONS[name]
        return np.array(
            [[rule(s, last) for s, last in zip(*row, strict=True)] for row in zip(self.steps, self.score, strict=True)]
        )

    def accuracy(self, budget: int, choose: Callable[[Array, NDArray[np.int64]], int], scores: Array) -> Array:
        """How often each puzzle is solved (n,) over disjoint groups of `budget` samples."""
        found = np.zeros(len(self.right))
        for start in range(0, POOL, budget):
            part = slice(start, start + budget)
            for i in range(len(found)):
                found[i] += self.right[i, part][choose(scores[i, part], self.answers[i, part])]
        return found * budget / POOL

    def solvable(self, budget: int) -> Array:
        """How often any of `budget` samples is right."""
        groups = self.right.reshape(len(self.right), -1, budget)
        return groups.any(2).mean(1)

    def spent(self, budget: int) -> Array:
        """Tokens of `budget` samples, on average (n,)."""
        return self.tokens.mean(1) * budget


def by_score(scores: Array, answers: NDArray[np.int64]) -> int:
    """Best-of-N."""
    return int(scores.argmax())


def by_vote(weights: Array, scores: Array, answers: NDArray[np.int64]) -> int:
    """The best candidate of the answer with the greatest weight; without any answer the best candidate."""
    voters = answers >= 0
    if not voters.any():
        return by_score(scores, answers)
    sums = np.bincount(answers[voters], weights[voters], minlength=1)
    totals = np.where(voters, sums[np.maximum(answers, 0)], -np.inf)
    leader = answers[totals.argmax()]
    return int(np.where(answers == leader, scores, -np.inf).argmax())


def weighted(scores: Array, answers: NDArray[np.int64]) -> int:
    """Best-of-N weighted."""
    return by_vote(scores, scores, answers)


def majority(scores: Array, answers: NDArray[np.int64]) -> int:
    """Majority vote."""
    return by_vote(np.ones(len(scores)), scores, answers)


def by_certainty(certainties: Array, answers: NDArray[np.int64]) -> int:
    """Self-certainty with Borda voting."""
    return borda(certainties, answers, SelfCertainty.power)[0]


def searched(results: Mapping[str, Any], model: str, kind: str, count: int, budget: int, column: int) -> Array | None:
    """The mean over repeats of a column (n,) of the results of a search."""
    rows = [results.get(f"{model}/{kind}/{i}", {}).get(str(budget)) for i in range(count)]
    if any(row is None for row in rows):
        return None
    return np.array([np.mean([run[column] for run in row]) for row in rows])


def interval(values: Array, seed: int = 0) -> dict[str, float]:
    """Mean in per cent and its 95% bootstrap interval over puzzles."""
    rows = np.random.default_rng(seed).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[rows].mean(1), [2.5, 97.5])
    found = {"y": values.mean(), "low": low, "high": high}
    return {name: round(100 * float(value), 2) for name, value in found.items()}


def line(name: str, points: Sequence[tuple[float | str, Array]]) -> dict[str, Any]:
    """A series of a figure."""
    return {"name": name, "points": [{"x": x, **interval(values)} for x, values in points]}


class Run:
    """Stored results, read once."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.pool = Pool.read(results, "shipped")
        self.count = len(self.pool.right)
        pool = self.pool
        self.accuracy: dict[int, dict[str, Array]] = {}
        self.tokens: dict[int, dict[str, Array]] = {}
        for budget in BUDGETS:
            table = {
                "best-of-N": pool.accuracy(budget, by_score, pool.score),
                "best-of-N weighted": pool.accuracy(budget, weighted, pool.score),
                "majority": pool.accuracy(budget, majority, pool.score),
                "self-certainty": pool.accuracy(budget, by_certainty, pool.certainty),
            }
            spent = dict.fromkeys(table, pool.spent(budget))
            for price in PRICES:
                name = f"adaptive at {price}, weighted"
                spent[name], table[name] = adaptive(pool, price, weighted, budget)
            for kind in METHODS:
                # Searches choose by score: on this task votes help none of them.
                found = searched(results, "shipped", kind, self.count, budget, 1)
                cost = searched(results, "shipped", kind, self.count, budget, 2)
                if found is not None and cost is not None:
                    table[kind], spent[kind] = found, cost
            self.accuracy[budget], self.tokens[budget] = table, spent
        self.oracle = quantile_bins(pool.probe_right.mean(1))
        self.predicted = quantile_bins(pool.probe_score.mean(1))
        self.few = quantile_bins(pool.probe_score[:, :FEW].mean(1))

    def curve(self, name: str) -> dict[str, Any]:
        """Accuracy of a method against the budget."""
        return line(name, [(b, self.accuracy[b][name]) for b in BUDGETS if name in self.accuracy[b]])

    def by_tokens(self, name: str) -> dict[str, Any]:
        """Accuracy of a method against what it costs."""
        return line(name, [(float(self.tokens[b][name].mean()), self.accuracy[b][name]) for b in BUDGETS])

    def pruned(self) -> list[tuple[Array, Array]]:
        """What each puzzle cost, and whether it was solved, at each budget that pruning was run at."""
        found = []
        for budget in BUDGETS:
            right, spent = (searched(self.results, "shipped", PRUNED, self.count, budget, column) for column in (0, 1))
            if right is not None and spent is not None:
                found.append((spent, right))
        return found


def methods(run: Run) -> list[dict[str, Any]]:
    """(a) Methods x budgets."""
    axes = {"x_label": "budget, completions", "y_label": "puzzles solved, %", "x_scale": "log2"}
    names = ("best-of-N", "best-of-N weighted", "majority", "self-certainty")
    any_right = line("any of the N (the limit)", [(b, run.pool.solvable(b)) for b in BUDGETS])
    found = [
        {
            "id": "methods",
            "title": "Samples side by side",
            "caption": f"{run.count} held-out puzzles of 4 numbers, disjoint groups of {POOL} samples each; bands are "
            "95% bootstrap intervals over puzzles.",
            **axes,
            "series": [*(run.curve(name) for name in names), any_right],
        },
        {
            "id": "search",
            "title": "Search against the scorer",
            "caption": "Beams and trees choose at every step by the scorer's value at its end; a budget of N for "
            "lookahead is N / (k + 1) beams. The best candidate by score is taken.",
            **axes,
            "series": [run.curve(name) for name in ("best-of-N", *METHODS)],
        },
    ]
    return [*found, saving(run)]


def saving(run: Run) -> dict[str, Any]:
    """Fewer tokens for the same: pruning, and stopping when more samples are not worth it."""
    voted = [f"adaptive at {price}, weighted" for price in PRICES]
    stopped = {
        "adaptive N": [adaptive(run.pool, price, by_score) for price in PRICES],
        "adaptive N, weighted": [(run.tokens[POOL][name], run.accuracy[POOL][name]) for name in voted],
    }
    return {
        "id": "saving",
        "title": "Fewer tokens",
        "caption": "Pruning drops half of the candidates at 12 tokens; adaptive N samples 4 at a time until one more "
        "is not worth its price, 0.1 to 0.002 of a score, at most 256.",
        "x_label": "tokens sampled for a puzzle",
        "y_label": "puzzles solved, %",
        "x_scale": "log2",
        "series": [
            *(run.by_tokens(name) for name in ("best-of-N", "best-of-N weighted")),
            *(
                line(name, [(float(spent.mean()), right) for spent, right in points])
                for name, points in ({PRUNED: run.pruned()} | stopped).items()
            ),
        ],
    }


def adaptive(
    pool: Pool, price: float, choose: Callable[[Array, NDArray[np.int64]], int], most: int = POOL, batch: int = 4
) -> tuple[Array, Array]:
    """Tokens, and how often each puzzle is solved, (n,) each, if sampling stops by the rule `gain` of `adaptive`."""
    right, spent = np.zeros((2, len(pool.right)))
    starts = range(0, POOL, POOL // 8)
    for start in starts:
        order = np.roll(np.arange(POOL), -start)
        best = np.maximum.accumulate(pool.score[:, order], 1)[:, batch - 1 : most : batch]
        count = np.arange(batch, most + 1, batch)
        enough = (1 - best) / (count + 1) <= price
        stop = count[np.where(enough.any(1), enough.argmax(1), len(count) - 1)]
        for i, n in enumerate(stop):
            rows = order[:n]
            right[i] += pool.right[i, rows][choose(pool.score[i, rows], pool.answers[i, rows])]
            spent[i] += pool.tokens[i, rows].sum()
    return spent / len(starts), right / len(starts)


def bins(run: Run) -> list[dict[str, Any]]:
    """(b) Difficulty x budget."""
    names = ["majority", "best-of-N", "beam, M = 4", "beam, M = sqrt N", "lookahead, k = 1"]
    return [
        {
            "id": f"bins-{budget}",
            "title": f"By difficulty, budget {budget}",
            "caption": "Bins are fifths of the puzzles by how many of 64 other samples are right.",
            "x_label": "difficulty",
            "y_label": "puzzles solved, %",
            "x_scale": "category",
            "series": [
                line(name, [(label, run.accuracy[budget][name][run.oracle == b]) for b, label in enumerate(BINS)])
                for name in names
                if name in run.accuracy[budget]
            ],
        }
        for budget in BUDGETS[:3]
    ]


def optimal(run: Run) -> dict[str, Any]:
    """(c) The compute-optimal policy, cross-validated, against best-of-N."""
    series = []
    for label, place, probe in (
        ("compute-optimal, oracle difficulty", run.oracle, 0),
        ("compute-optimal, predicted", run.predicted, 0),
        (f"compute-optimal, predicted from {FEW} samples, counted", run.few, FEW),
    ):
        points = []
        for budget in BUDGETS:
            found, chosen = cross_validated(run.accuracy[budget], place, tokens=run.tokens[budget])
            spent = np.array([run.tokens[budget][name][i] for i, name in enumerate(chosen)])
            # The samples that say how hard a puzzle is are the first ones of a method that samples.
            extra = np.array([name in METHODS for name in chosen]) * run.pool.spent(probe)
            points.append((float((spent + extra).mean()), found))
        series.append(line(label, points))
    base = [run.by_tokens(name) for name in ("best-of-N", "best-of-N weighted")]
    return {
        "id": "optimal",
        "title": "Choosing the method by difficulty",
        "caption": "For each fifth of difficulty and each budget the method that solved most on one half of the "
        "puzzles (the cheapest within a point) is used on the other half. Difficulty by right samples (oracle) or by "
        "the mean score (predicted) of 64 other samples, which are not counted; or from 4 that are.",
        "x_label": "tokens sampled for a puzzle",
        "y_label": "puzzles solved, %",
        "x_scale": "log2",
        "series": [*base, *series],
    }


def scorers(run: Run) -> list[dict[str, Any]]:
    """(d) Aggregations, and labels of the process against labels of the outcome."""
    axes = {"x_label": "budget, completions", "y_label": "puzzles solved, %", "x_scale": "log2"}
    pool = run.pool
    found = [
        {
            "id": "aggregation",
            "title": "Aggregation of step scores",
            "caption": "Best-of-N with the scores at the steps' ends and at the end, put together in four ways.",
            **axes,
            "series": [
                line(name, [(b, pool.accuracy(b, by_score, pool.aggregated(name))) for b in BUDGETS])
                for name in _AGGREGATIONS
            ],
        }
    ]
    series = []
    for model, label in (("small", "process labels"), ("small_outcome", "outcome labels")):
        if f"{model}/pool/0" not in run.results:
            return found
        small = Pool.read(run.results, model)
        series.append(line(f"{label}, best-of-N", [(b, small.accuracy(b, by_score, small.score)) for b in BUDGETS]))
        beams = [(b, searched(run.results, model, "beam, M = 4", len(small.right), b, 1)) for b in BUDGETS]
        series.append(line(f"{label}, beam M = 4", [(b, values) for b, values in beams if values is not None]))
    return [
        *found,
        {
            "id": "labels",
            "title": "What the scorer learned from",
            "caption": "A model of 230,273 parameters with two scorers: trained on whether each step can still lead "
            "to the target, or only on whether the whole completion is right.",
            **axes,
            "series": series,
        },
    ]


def matched(run: Run) -> list[dict[str, Any]]:
    """(e) A model of a fourteenth of the parameters with test-time compute, FLOPs matched."""
    if "small/pool/0" not in run.results or f"shipped/greedy/{run.count - 1}" not in run.results:
        return []
    small = Pool.read(run.results, "small")
    greedy = np.array([run.results[f"shipped/greedy/{i}"]["right"] for i in range(run.count)], float)
    place = quantile_bins(small.probe_right.mean(1))
    groups = [("all", np.ones(run.count, bool)), *((label, place == b) for b, label in enumerate(BINS))]
    # M + 3 (M - 1) / R times the inference for M = 14: 258, 63 and 16 completions.
    rules = [("R = 22", 16), ("R = 0.79", 64), ("R = 0.16", 256)]
    series = [
        line(
            f"small, best of {n} weighted ({ratio})",
            [(label, small.accuracy(n, weighted, small.score)[rows]) for label, rows in groups],
        )
        for ratio, n in rules
    ]
    series.append(line("14 times the parameters, greedy", [(label, greedy[rows]) for label, rows in groups]))
    return [
        {
            "id": "flops",
            "title": "Test-time compute or parameters",
            "caption": "The small model has a fourteenth of the parameters and samples as many completions as the "
            "same FLOPs allow, for three ratios R of inference to pretraining tokens. Bins by its own samples.",
            "x_label": "difficulty for the small model",
            "y_label": "puzzles solved, %",
            "x_scale": "category",
            "series": series,
        }
    ]


def revisions(run: Run) -> list[dict[str, Any]]:
    """(f) Sequential against parallel."""
    rows = []
    while f"revise/chains/{len(rows)}" in run.results:
        rows.append(run.results[f"revise/chains/{len(rows)}"])
    if len(rows) < 2:
        return []
    # How hard a puzzle is: the first attempts of 32 chains.
    first = np.array([np.mean(row["32"]["right"]) for row in rows])
    easy = first >= np.median(first)
    labels = [f"{c} x {32 // c}" for c in CHAINS]
    series = []
    for name, members in (("all", np.ones(len(rows), bool)), ("easier half", easy), ("harder half", ~easy)):
        for key, how in (("weighted", "weighted"), ("score", "best score")):
            values = [np.array([row[str(c)][key] for row in rows], float)[members] for c in CHAINS]
            series.append(line(f"{name}, {how}", list(zip(labels, values, strict=True))))
    steps = np.array([np.array(row["4"]["right"]).reshape(4, 8) for row in rows], float)
    attempts = line("four chains", [(t + 1, steps[:, :, t].mean(1)) for t in range(8)])
    return [
        {
            "id": "revisions",
            "title": "Revisions: sequential or parallel",
            "caption": f"{len(rows)} puzzles, 32 attempts of a model that was trained to revise, in chains x attempts "
            "in each; weighted is a vote within each chain, then among the chains.",
            "x_label": "chains x attempts in each",
            "y_label": "puzzles solved, %",
            "x_scale": "category",
            "series": series,
        },
        {
            "id": "attempts",
            "title": "The attempts of a chain",
            "caption": "How many of the n-th attempts are right, each written with the four before it in view.",
            "x_label": "attempt",
            "y_label": "right, %",
            "x_scale": "linear",
            "series": [attempts],
        },
    ]


def figures(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every figure that the results suffice for."""
    run = Run(results)
    return [*methods(run), *bins(run), optimal(run), *scorers(run), *matched(run), *revisions(run)]


def policy(results: Mapping[str, Any], artifact: Path) -> Policy:
    """What to use on puzzles of each difficulty, if the difficulty is seen from a few samples; without votes."""
    run, manifest = Run(results), read_verified(artifact)
    settings = {"best-of-N": Choice("best_of_n", {}), **{name: Choice(*how) for name, how in METHODS.items()}}
    accuracy = {
        budget: {name: values for name, values in table.items() if name in settings}
        for budget, table in run.accuracy.items()
    }
    easiness = run.pool.probe_score[:, :FEW].mean(1)
    what = {"name": manifest.name, "artifact": manifest.seal, "probe": FEW, "tokens": run.tokens}
    return fit_policy(accuracy, easiness, settings, **what)


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Write `figures.json`, for `bonnx report`, `policy.json`, and `figures.png` with four of the figures."""
    artifact = folder / "models" / "shipped"
    if artifact.is_dir():
        policy(results, artifact).save(folder / "policy.json")
    drawn = figures(results)
    (folder / "figures.json").write_text(json.dumps(drawn, indent=1) + "\n", encoding="utf-8")
    canvas = Canvas(figsize=(11, 9.5), dpi=110, layout="constrained")
    shown = [figure for figure in msgspec.convert(drawn, list[Figure]) if figure.id in _PICTURE]
    for axes, figure in zip(canvas.subplots(2, 2).flat, shown, strict=True):
        plot(axes, figure)
        axes.set_title(figure.title)
        axes.legend(fontsize=8, frameon=False)
    canvas.savefig(folder / "figures.png")


def table(results: Mapping[str, Any], count: int) -> str:
    """Accuracy and cost of every method at every budget, as Markdown."""
    run = Run({key: value for key, value in results.items() if int(key.rsplit("/", 1)[1]) < count})
    lines = [f"{run.count} held-out puzzles; solved, %, and tokens sampled for a puzzle", ""]
    lines += ["| method |" + "".join(f" {b} |" for b in BUDGETS), "|---|" + "---|" * len(BUDGETS)]
    for name in dict.fromkeys(name for b in BUDGETS for name in run.accuracy[b]):
        cells = []
        for budget in BUDGETS:
            values = run.accuracy[budget].get(name)
            cells.append("-" if values is None else f"{100 * values.mean():.1f}, {run.tokens[budget][name].mean():.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if len(cut := run.pruned()) == len(BUDGETS):
        cells = [f"{100 * right.mean():.1f}, {spent.mean():.0f}" for spent, right in cut]
        lines.append(f"| {PRUNED} | {' | '.join(cells)} |")
    chains = [results[key] for key in results if key.startswith("revise/") and int(key.rsplit("/", 1)[1]) < count]
    if chains:
        lines += ["", f"Revisions, 32 attempts, weighted, {len(chains)} puzzles (chains x attempts: solved, %): "]
        shares = [f"{c} x {32 // c}: {100 * np.mean([row[str(c)]['weighted'] for row in chains]):.1f}" for c in CHAINS]
        lines[-1] += ", ".join(shares)
    return "\n".join(lines)

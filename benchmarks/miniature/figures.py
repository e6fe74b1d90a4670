"""Figures and tables from stored results; nothing is sampled here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from matplotlib.figure import Figure as Canvas

from bonnx.runtime.artifact.folder import read_verified
from bonnx.runtime.report import Figure
from bonnx.runtime.report.curves import plot
from bonnx.runtime.search import Choice, Policy, cross_validated, fit_policy, quantile_bins

from .pool import AGGREGATIONS, Pool, adaptive, by_score, weighted
from .results import FEW, PRICES, Results, line, searched
from .work import BUDGETS, CHAINS, METHODS, POOL, PRUNED

__all__ = ["draw", "table"]

BINS = ["1 (easiest)", "2", "3", "4", "5 (hardest)"]
_PICTURE = ("methods", "search", "saving", "optimal")


def methods(results: Results) -> list[dict[str, Any]]:
    """Return figures (a): methods x budgets."""
    axes = {"x_label": "budget, completions", "y_label": "puzzles solved, %", "x_scale": "log2"}
    names = ("best-of-N", "best-of-N weighted", "majority", "self-certainty")
    any_right = line("any of the N (the limit)", [(b, results.pool.solvable(b)) for b in BUDGETS])
    figures = [
        {
            "id": "methods",
            "title": "Samples side by side",
            "caption": f"{results.count} held-out puzzles of 4 numbers, disjoint groups of {POOL} samples each; bands "
            "are 95% bootstrap intervals over puzzles.",
            **axes,
            "series": [*(results.curve(name) for name in names), any_right],
        },
        {
            "id": "search",
            "title": "Search against the scorer",
            "caption": "Beams and trees select at every step by the score at its end; a budget of N for lookahead is "
            "N / (k + 1) beams. The best candidate by score is selected.",
            **axes,
            "series": [results.curve(name) for name in ("best-of-N", *METHODS)],
        },
    ]
    return [*figures, saving(results)]


def saving(results: Results) -> dict[str, Any]:
    """Return the figure of methods that save tokens: pruning, and stopping when more samples are not worth it."""
    voted = [f"adaptive at {price}, weighted" for price in PRICES]
    stopped = {
        "adaptive N": [adaptive(results.pool, price, by_score) for price in PRICES],
        "adaptive N, weighted": [(results.tokens[POOL][name], results.accuracy[POOL][name]) for name in voted],
    }
    return {
        "id": "saving",
        "title": "Fewer tokens",
        "caption": "Pruning drops half of the candidates at 12 tokens; adaptive N samples 4 at a time, up to 256, "
        "until one more is not worth its price, 0.1 to 0.002 in units of the score.",
        "x_label": "tokens sampled for a puzzle",
        "y_label": "puzzles solved, %",
        "x_scale": "log2",
        "series": [
            *(results.by_tokens(name) for name in ("best-of-N", "best-of-N weighted")),
            *(
                line(name, [(float(spent.mean()), right) for spent, right in points])
                for name, points in ({PRUNED: results.pruned()} | stopped).items()
            ),
        ],
    }


def bins(results: Results) -> list[dict[str, Any]]:
    """Return figures (b): difficulty x budget."""
    names = ["majority", "best-of-N", "beam, M = 4", "beam, M = sqrt N", "lookahead, k = 1"]
    return [
        {
            "id": f"bins-{budget}",
            "title": f"By difficulty, budget {budget}",
            "caption": "Bins are quintiles of the puzzles by the number of 64 other samples that are right.",
            "x_label": "difficulty",
            "y_label": "puzzles solved, %",
            "x_scale": "category",
            "series": [
                line(
                    name, [(label, results.accuracy[budget][name][results.oracle == b]) for b, label in enumerate(BINS)]
                )
                for name in names
                if name in results.accuracy[budget]
            ],
        }
        for budget in BUDGETS[:3]
    ]


def optimal(results: Results) -> dict[str, Any]:
    """Return figure (c): the compute-optimal policy, cross-validated, against best-of-N."""
    series = []
    for label, place, probe in (
        ("compute-optimal, oracle difficulty", results.oracle, 0),
        ("compute-optimal, predicted", results.predicted, 0),
        (f"compute-optimal, predicted from {FEW} samples, counted", results.few, FEW),
    ):
        points = []
        for budget in BUDGETS:
            accuracy, chosen = cross_validated(results.accuracy[budget], place, tokens=results.tokens[budget])
            spent = np.array([results.tokens[budget][name][i] for i, name in enumerate(chosen)])
            # For methods that sample, the samples that estimate difficulty are among their own.
            extra = np.array([name in METHODS for name in chosen]) * results.pool.spent(probe)
            points.append((float((spent + extra).mean()), accuracy))
        series.append(line(label, points))
    base = [results.by_tokens(name) for name in ("best-of-N", "best-of-N weighted")]
    return {
        "id": "optimal",
        "title": "Choosing the method by difficulty",
        "caption": "For each quintile of difficulty and each budget, the method that solved the most puzzles in one "
        "half (the cheapest within a point) is used on the other half. Difficulty is the number of right samples "
        "(oracle) or the mean score (predicted) of 64 other samples, whose cost is not counted, or the mean score of 4 "
        "samples, whose cost is.",
        "x_label": "tokens sampled for a puzzle",
        "y_label": "puzzles solved, %",
        "x_scale": "log2",
        "series": [*base, *series],
    }


def scorers(results: Results) -> list[dict[str, Any]]:
    """Return figures (d): aggregations, and process labels against outcome labels."""
    axes = {"x_label": "budget, completions", "y_label": "puzzles solved, %", "x_scale": "log2"}
    pool = results.pool
    figures = [
        {
            "id": "aggregation",
            "title": "Aggregation of step scores",
            "caption": "Best-of-N with the scores at the ends of steps and at the end, aggregated in four ways.",
            **axes,
            "series": [
                line(name, [(b, pool.accuracy(b, by_score, pool.aggregated(name))) for b in BUDGETS])
                for name in AGGREGATIONS
            ],
        }
    ]
    series = []
    for model, label in (("small", "process labels"), ("small_outcome", "outcome labels")):
        if f"{model}/pool/0" not in results.stored:
            return figures
        small = Pool.read(results.stored, model)
        series.append(line(f"{label}, best-of-N", [(b, small.accuracy(b, by_score, small.score)) for b in BUDGETS]))
        beams = [(b, searched(results.stored, model, "beam, M = 4", len(small.right), b, 1)) for b in BUDGETS]
        series.append(line(f"{label}, beam M = 4", [(b, values) for b, values in beams if values is not None]))
    return [
        *figures,
        {
            "id": "labels",
            "title": "What the scorer learned from",
            "caption": "A model of 230,273 parameters with two scorers: trained on whether each step can still lead "
            "to the target, or only on whether the whole completion is right.",
            **axes,
            "series": series,
        },
    ]


def matched(results: Results) -> list[dict[str, Any]]:
    """Return figure (e): a model with a fourteenth of the parameters and test-time compute, FLOPs matched."""
    if "small/pool/0" not in results.stored or f"shipped/greedy/{results.count - 1}" not in results.stored:
        return []
    small = Pool.read(results.stored, "small")
    greedy = np.array([results.stored[f"shipped/greedy/{i}"]["right"] for i in range(results.count)], float)
    place = quantile_bins(small.probe_right.mean(1))
    groups = [("all", np.ones(results.count, bool)), *((label, place == b) for b, label in enumerate(BINS))]
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
            "same FLOPs allow, for three ratios R of inference to pretraining tokens. Bins are by its own samples.",
            "x_label": "difficulty for the small model",
            "y_label": "puzzles solved, %",
            "x_scale": "category",
            "series": series,
        }
    ]


def revisions(results: Results) -> list[dict[str, Any]]:
    """Return figures (f): sequential against parallel."""
    rows = []
    while f"revise/chains/{len(rows)}" in results.stored:
        rows.append(results.stored[f"revise/chains/{len(rows)}"])
    if len(rows) < 2:
        return []
    # Difficulty is measured by the first attempts of 32 chains.
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
            "caption": f"{len(rows)} puzzles, 32 attempts of a model trained to revise, as chains x attempts per "
            "chain; weighted is a vote within each chain, then among the chains.",
            "x_label": "chains x attempts in each",
            "y_label": "puzzles solved, %",
            "x_scale": "category",
            "series": series,
        },
        {
            "id": "attempts",
            "title": "The attempts of a chain",
            "caption": "The share of n-th attempts that is right; each attempt follows up to four earlier ones.",
            "x_label": "attempt",
            "y_label": "right, %",
            "x_scale": "linear",
            "series": [attempts],
        },
    ]


def figures(stored: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every figure for which there are enough stored results."""
    results = Results(stored)
    return [
        *methods(results),
        *bins(results),
        optimal(results),
        *scorers(results),
        *matched(results),
        *revisions(results),
    ]


def policy(stored: Mapping[str, Any], artifact: Path) -> Policy:
    """Return the policy for puzzles of each difficulty, as estimated from a few samples; without votes."""
    results, manifest = Results(stored), read_verified(artifact)
    settings = {"best-of-N": Choice("best_of_n", {}), **{name: Choice(*how) for name, how in METHODS.items()}}
    accuracy = {
        budget: {name: values for name, values in table.items() if name in settings}
        for budget, table in results.accuracy.items()
    }
    easiness = results.pool.probe_score[:, :FEW].mean(1)
    source = {"name": manifest.name, "artifact": manifest.seal, "probe": FEW, "tokens": results.tokens}
    return fit_policy(accuracy, easiness, settings, **source)


def draw(stored: Mapping[str, Any], folder: Path) -> None:
    """Write `figures.json`, for `bonnx report`, `policy.json`, and `figures.png` with four of the figures."""
    artifact = folder / "models" / "shipped"
    if artifact.is_dir():
        policy(stored, artifact).save(folder / "policy.json")
    drawn = figures(stored)
    (folder / "figures.json").write_text(json.dumps(drawn, indent=1) + "\n", encoding="utf-8")
    canvas = Canvas(figsize=(11, 9.5), dpi=110, layout="constrained")
    shown = [figure for figure in msgspec.convert(drawn, list[Figure]) if figure.id in _PICTURE]
    for axes, figure in zip(canvas.subplots(2, 2).flat, shown, strict=True):
        plot(axes, figure)
        axes.set_title(figure.title)
        axes.legend(fontsize=8, frameon=False)
    canvas.savefig(folder / "figures.png")


def table(stored: Mapping[str, Any], count: int) -> str:
    """Return accuracy and cost of every method at every budget, as Markdown."""
    results = Results({key: value for key, value in stored.items() if int(key.rsplit("/", 1)[1]) < count})
    lines = [f"{results.count} held-out puzzles; solved, %, and tokens sampled for a puzzle", ""]
    lines += ["| method |" + "".join(f" {b} |" for b in BUDGETS), "|---|" + "---|" * len(BUDGETS)]
    for name in dict.fromkeys(name for b in BUDGETS for name in results.accuracy[b]):
        cells = []
        for budget in BUDGETS:
            values = results.accuracy[budget].get(name)
            cells.append(
                "-" if values is None else f"{100 * values.mean():.1f}, {results.tokens[budget][name].mean():.0f}"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if len(cut := results.pruned()) == len(BUDGETS):
        cells = [f"{100 * right.mean():.1f}, {spent.mean():.0f}" for spent, right in cut]
        lines.append(f"| {PRUNED} | {' | '.join(cells)} |")
    chains = [stored[key] for key in stored if key.startswith("revise/") and int(key.rsplit("/", 1)[1]) < count]
    if chains:
        lines += ["", f"Revisions, 32 attempts, weighted, {len(chains)} puzzles (chains x attempts: solved, %): "]
        shares = [f"{c} x {32 // c}: {100 * np.mean([row[str(c)]['weighted'] for row in chains]):.1f}" for c in CHAINS]
        lines[-1] += ", ".join(shares)
    return "\n".join(lines)

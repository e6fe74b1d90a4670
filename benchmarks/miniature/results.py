"""Accuracy and cost of every method from stored results, with bootstrap intervals over puzzles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bonnx.runtime.search import quantile_bins

from .pool import Array, Pool, adaptive, by_certainty, by_score, majority, weighted
from .work import BUDGETS, METHODS, PRUNED

__all__ = ["FEW", "PRICES", "Results", "interval", "line", "searched"]

# Completions whose mean score predicts a prompt's difficulty when their cost is counted.
FEW = 4
# Prices of one more completion, in units of the score.
PRICES = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002)


def searched(results: Mapping[str, Any], model: str, kind: str, count: int, budget: int, column: int) -> Array | None:
    """Return the mean over repeats of a column (n,) of a search's results."""
    rows = [results.get(f"{model}/{kind}/{i}", {}).get(str(budget)) for i in range(count)]
    if any(row is None for row in rows):
        return None
    return np.array([np.mean([run[column] for run in row]) for row in rows])


def interval(values: Array, seed: int = 0) -> dict[str, float]:
    """Return the mean in per cent and its 95% bootstrap interval over puzzles."""
    rows = np.random.default_rng(seed).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[rows].mean(1), [2.5, 97.5])
    bounds = {"y": values.mean(), "low": low, "high": high}
    return {name: round(100 * float(value), 2) for name, value in bounds.items()}


def line(name: str, points: Sequence[tuple[float | str, Array]]) -> dict[str, Any]:
    """Return a series of a figure."""
    return {"name": name, "points": [{"x": x, **interval(values)} for x, values in points]}


class Results:
    """Accuracy and cost of all methods, computed once from stored results."""

    def __init__(self, stored: Mapping[str, Any]) -> None:
        self.stored = stored
        self.pool = Pool.read(stored, "shipped")
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
                # Searches select by score, because votes do not help any of them on this task.
                accuracy = searched(stored, "shipped", kind, self.count, budget, 1)
                cost = searched(stored, "shipped", kind, self.count, budget, 2)
                if accuracy is not None and cost is not None:
                    table[kind], spent[kind] = accuracy, cost
            self.accuracy[budget], self.tokens[budget] = table, spent
        self.oracle = quantile_bins(pool.probe_right.mean(1))
        self.predicted = quantile_bins(pool.probe_score.mean(1))
        self.few = quantile_bins(pool.probe_score[:, :FEW].mean(1))

    def curve(self, name: str) -> dict[str, Any]:
        """Return a method's accuracy against the budget."""
        return line(name, [(b, self.accuracy[b][name]) for b in BUDGETS if name in self.accuracy[b]])

    def by_tokens(self, name: str) -> dict[str, Any]:
        """Return a method's accuracy against its cost."""
        return line(name, [(float(self.tokens[b][name].mean()), self.accuracy[b][name]) for b in BUDGETS])

    def pruned(self) -> list[tuple[Array, Array]]:
        """Return each puzzle's cost and whether it was solved, for each budget at which pruning was run."""
        points = []
        for budget in BUDGETS:
            right, spent = (searched(self.stored, "shipped", PRUNED, self.count, budget, column) for column in (0, 1))
            if right is not None and spent is not None:
                points.append((spent, right))
        return points

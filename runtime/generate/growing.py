"""Candidates of one prompt while they grow, and which of them survive a pruning."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np

from ..arrays import Array
from ..selection.aggregate import aggregate_tokens
from .options import CheckedOptions
from .result import FINISH_REASONS

__all__ = ["DEADLINE", "LENGTH", "PRUNED", "STOP", "Growing", "survivors"]

LENGTH, STOP, PRUNED, DEADLINE = range(len(FINISH_REASONS))


class Growing:
    """Candidates of one prompt while they grow.

    Attributes:
        tokens: (n, T) int64; 0 beyond a candidate's length.
        scores: (n, T) float32.
        log_probs: (n, T) float32.
        lengths: (n,) int64.
        reasons: (n,) int64, an index into `FINISH_REASONS`, or -1 while a candidate grows.
        kept: (n,) bool, whether it has survived every pruning.
        computed: tokens that the network has read.
        top_tokens: (n, T, k) int64, the most likely tokens at each place; k is 0 unless they are asked for.
        top_log_probs: (n, T, k) float32, of each of them.

    Args:
        options: how to generate.
        step_token: ends a step, for the step aggregations.
        ends: whether the last of a candidate's tokens (length,) completes a stop text; only tokens end them without it.
    """

    def __init__(
        self, options: CheckedOptions, step_token: int | None, ends: Callable[[Array], bool] | None = None
    ) -> None:
        n = options.n
        self._ends, self._stops = ends, np.array([*options.stop_tokens], np.int64)
        self.options, self.step_token = options, step_token
        # Of all tokens that there is room for so far; it doubles when they need more.
        self._tables = {
            name: np.zeros((n, 0, *inner), dtype)
            for name, inner, dtype in (
                ("tokens", (), np.int64),
                ("scores", (), np.float32),
                ("log_probs", (), np.float32),
                ("top_tokens", (0,), np.int64),
                ("top_log_probs", (0,), np.float32),
            )
        }
        self.length = 0
        self.lengths, self.reasons = np.zeros(n, np.int64), np.full(n, -1)
        self.kept = np.ones(n, bool)
        self.computed = 0

    def add(self, numbers: Array, tokens: Array, scores: Array, log_probs: Array) -> None:
        """One token of each running candidate: all (rows,)."""
        # As in the graph: a token drawn from no distribution makes a candidate that cannot win.
        scores = np.where(np.isnan(log_probs), np.float32(np.nan), scores)
        place = self.length
        self._make_room(place + 1)
        for name, values in (("tokens", tokens), ("scores", scores), ("log_probs", log_probs)):
            self._tables[name][numbers, place] = values
        self.length += 1
        self.lengths[numbers] += 1
        self.computed += len(numbers)
        self.reasons[numbers[(tokens[:, None] == self._stops).any(1)]] = STOP
        if self._ends is not None:
            for number in numbers[self.reasons[numbers] < 0]:
                if self._ends(self.tokens[number, : self.lengths[number]]):
                    self.reasons[number] = STOP

    def add_top(self, numbers: Array, tokens: Array, log_probs: Array) -> None:
        """The most likely tokens at the place of the last token of some candidates: (rows, k) or (1, k)."""
        for name, values in (("top_tokens", tokens), ("top_log_probs", log_probs)):
            table = self._tables[name]
            if not table.shape[2]:
                table = np.zeros((*table.shape[:2], values.shape[1]), table.dtype)
                self._tables[name] = table
            table[numbers, self.length - 1] = values

    def _make_room(self, length: int) -> None:
        for name, table in self._tables.items():
            if table.shape[1] < length:
                wider = np.zeros((len(table), max(16, 2 * table.shape[1]), *table.shape[2:]), table.dtype)
                wider[:, : table.shape[1]] = table
                self._tables[name] = wider

    @property
    def tokens(self) -> Array:
        return self._tables["tokens"][:, : self.length]

    @property
    def scores(self) -> Array:
        return self._tables["scores"][:, : self.length]

    @property
    def log_probs(self) -> Array:
        return self._tables["log_probs"][:, : self.length]

    @property
    def top_tokens(self) -> Array:
        return self._tables["top_tokens"][:, : self.length]

    @property
    def top_log_probs(self) -> Array:
        return self._tables["top_log_probs"][:, : self.length]

    def snapshot(self) -> Growing:
        """The candidates as they are now; what is added later does not change it."""
        other = copy.copy(self)
        # The columns of the tables are written once.
        other._tables = {**self._tables}
        other.lengths, other.reasons, other.kept = self.lengths.copy(), self.reasons.copy(), self.kept.copy()
        return other

    def select(self) -> tuple[Array, int]:
        """Each candidate's score (n,) as it stands, NaN for a pruned one, and the best index, -1 if nothing can win."""
        mask = np.arange(self.tokens.shape[1]) < self.lengths[:, None]
        return self._select(mask & (self.reasons != PRUNED)[:, None])

    def _select(self, mask: Array) -> tuple[Array, int]:
        return aggregate_tokens(self.scores, mask, self.tokens, self.step_token, self.options.aggregation)

    def prune(self) -> None:
        """Keep the best of those that are still kept, ended ones included, as `generate` does."""
        scores, _ = self._select(np.arange(self.tokens.shape[1]) < self.lengths[:, None])
        self.kept = survivors(scores, self.kept, self.options.prune_keep)
        self.reasons[(self.reasons < 0) & ~self.kept] = PRUNED


def survivors(scores: Array, kept: Array, keep: float) -> Array:
    """Which candidates survive a pruning, (n,) bool: the best share of those in `kept`, rounded as in the graph."""
    ranked = np.where(kept & ~np.isnan(scores), scores, -np.inf)
    order = np.argsort(-ranked, kind="stable")
    limit = max(1, math.ceil(np.float32(kept.sum()) * np.float32(keep) - np.float32(1e-4)))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    going: Array = kept & (place < limit)
    return going

"""Generations that grow together, a token at a time: one may join or leave at any token.

A token of a generation is the same whatever grows beside it, to rounding. Shapes: M rows of all prompts; the others as
in the graphs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from ..arrays import Array
from ..engine.session import Stop
from .growing import DEADLINE, LENGTH, Growing
from .prompts import Joining, ReadPrompt
from .rows import Rows, RowStates

__all__ = ["ContinuousBatch", "most_likely"]


@dataclass(eq=False)
class _Entry:
    """A generation in a batch."""

    growing: Growing
    slot: int
    deadline: float | None
    top: tuple[Array, Array] | None


class ContinuousBatch:
    """Generations that grow together.

    Args:
        rows: run them; for this batch alone.
        step_token: ends a step, for the step aggregations.
    """

    def __init__(self, rows: Rows, step_token: int | None) -> None:
        self._run, self._step_token = rows, step_token
        self._prompts = rows.prompts
        self._entries: list[_Entry] = []
        self._clear()

    def _clear(self) -> None:
        self._run.clear()
        self._owner = np.zeros(0, np.int64)
        self._numbers, self._lengths, self._sources, self._tokens = (np.zeros(0, np.int64) for _ in range(4))
        self._log_probs, self._certainties = np.zeros((2, 0), np.float32)

    @property
    def rows(self) -> int:
        """How many candidates are growing."""
        return len(self._tokens)

    @property
    def generations(self) -> list[Growing]:
        """Those that are growing."""
        return [entry.growing for entry in self._entries]

    def padding(self, prompt: int, count: int) -> tuple[int, int]:
        """What joining would make the batch compute for nothing at a token.

        Args:
            prompt: tokens of the prompt.
            count: candidates.

        Returns:
            pairs of a candidate and a prompt's token, and tokens of candidates whose keys and values are copied.
        """
        counts = np.bincount(self._owner, minlength=len(self._entries)).tolist()
        used = [(self._prompts.length(entry.slot), n) for entry, n in zip(self._entries, counts, strict=True)]
        used.append((prompt, count))
        pairs = len(used) * max(p for p, _ in used) * max(n for _, n in used) - sum(p * n for p, n in used)
        longest = int(self._lengths.max(initial=0))
        tokens = longest * (self.rows + count) - int(self._lengths.sum())
        return pairs, tokens

    def join(self, read: ReadPrompt, joining: Joining) -> Growing:
        """Let a generation grow with the others from the next token on."""
        options = joining.options
        growing = Growing(options, self._step_token, joining.ends)
        slot = self._prompts.add(read, options)
        top = None
        if options.top_log_probs:
            assert read.logits is not None
            top = most_likely(read.logits[None], options.top_log_probs)
        self._entries.append(_Entry(growing, slot, joining.deadline, top))
        n = options.n
        # A row that has read nothing may continue any.
        zeros = np.zeros(n, np.int64)
        self._owner = np.append(self._owner, np.full(n, len(self._entries) - 1))
        self._numbers = np.append(self._numbers, np.arange(n))
        self._lengths = np.append(self._lengths, zeros)
        self._sources = np.append(self._sources, zeros)
        self._tokens = np.append(self._tokens, read.tokens)
        self._log_probs = np.append(self._log_probs, read.log_probs)
        self._certainties = np.append(self._certainties, np.full(n, read.certainty, np.float32))
        return growing

    def step(self, stop: Stop | None = None) -> list[Growing]:
        """Let every candidate read a token and draw the next; the generations, of which some have ended and left."""
        slots = np.array([entry.slot for entry in self._entries])
        with_top = any(entry.growing.options.top_log_probs for entry in self._entries)
        states = RowStates(self._tokens, slots[self._owner], self._numbers, self._lengths, self._sources)
        read = self._run(states, logits=with_top, stop=stop)
        # Without a scorer, the score of a token is the certainty of the distribution that it was drawn from.
        scores, logits = self._certainties if read.scores is None else read.scores, read.logits
        now, stays = time.monotonic(), np.ones(self.rows, bool)
        starts = np.searchsorted(self._owner, np.arange(len(self._entries) + 1))
        generations = self.generations
        for entry, begin, end in zip(self._entries, starts[:-1], starts[1:], strict=True):
            part = slice(begin, end)
            _add(entry, self._numbers[part], self._tokens[part], scores[part], self._log_probs[part], now)
            stays[part] = entry.growing.reasons[self._numbers[part]] < 0
            if logits is not None and entry.growing.options.top_log_probs:
                entry.top = most_likely(logits[part][stays[part]], entry.growing.options.top_log_probs)
        self._lengths = self._lengths + 1
        self._sources = np.arange(self.rows)
        self._tokens, self._log_probs = read.next_tokens, read.log_probs
        self._certainties = self._certainties if read.certainties is None else read.certainties
        if not stays.all():
            self._keep(stays)
        return generations

    def leave(self, growing: Growing) -> None:
        """Drop a generation before it has ended."""
        (i,) = (i for i, entry in enumerate(self._entries) if entry.growing is growing)
        self._keep(self._owner != i)

    def _keep(self, stays: Array) -> None:
        """Continue with some of the rows, (M,) bool; generations without any leave."""
        left = np.bincount(self._owner[stays], minlength=len(self._entries))
        for i in np.flatnonzero(left == 0)[::-1]:
            freed = self._entries[i].slot
            moved = self._prompts.remove(freed)
            for entry in self._entries:
                if entry.slot == moved:
                    entry.slot = freed
        self._entries = [entry for i, entry in enumerate(self._entries) if left[i]]
        renumbered = np.cumsum(left > 0) - 1
        self._owner = renumbered[self._owner[stays]]
        for name in ("_numbers", "_lengths", "_sources", "_tokens", "_log_probs", "_certainties"):
            setattr(self, name, getattr(self, name)[stays])
        if not self._entries:
            self._clear()


def _add(entry: _Entry, numbers: Array, tokens: Array, scores: Array, log_probs: Array, now: float) -> None:
    """Add a token of each of a generation's running candidates, and end those that it ends: all (rows,)."""
    growing, options = entry.growing, entry.growing.options
    growing.add(numbers, tokens, scores, log_probs)
    if entry.top is not None:
        growing.add_top(numbers, *entry.top)
    if options.prune_every and growing.length % options.prune_every == 0:
        growing.prune()
    running = growing.reasons < 0
    if growing.length == options.max_new_tokens:
        growing.reasons[running] = LENGTH
    elif entry.deadline is not None and now > entry.deadline:
        growing.reasons[running] = DEADLINE


def most_likely(logits: Array, count: int) -> tuple[Array, Array]:
    """The tokens of the largest logits (rows, V), most likely first, (rows, k) int64, and their log-probabilities."""
    wide = logits.astype(np.float64)
    count = min(count, wide.shape[-1])
    order = np.argpartition(-wide, count - 1, -1)[:, :count]
    order = np.take_along_axis(order, np.argsort(-np.take_along_axis(wide, order, -1), -1, kind="stable"), -1)
    peak = wide.max(-1, keepdims=True)
    # Infinite logits are no distribution: the log-probabilities are NaN.
    with np.errstate(invalid="ignore"):
        log_sum = peak + np.log(np.exp(wide - peak).sum(-1, keepdims=True))
        return order.astype(np.int64), (np.take_along_axis(wide, order, -1) - log_sum).astype(np.float32)

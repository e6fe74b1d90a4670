"""Generation that the host steers: `prefill` once, then `decode` token by token. The same tokens as `generate`.

What differs from one `Run` of `generate` is that the host sees every step: for streaming, a deadline, or a search.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import numpy as np

from ..arrays import Array
from ..checks import check_number
from ..engine.session import Session
from ..selection.aggregate import aggregate, aggregation_code, is_stepwise
from .options import Request
from .result import FINISH_REASONS

__all__ = ["DEADLINE", "LENGTH", "PRUNED", "STOP", "Growing", "clock", "generate_feeds", "grow", "survivors"]

LENGTH, STOP, PRUNED, DEADLINE = range(len(FINISH_REASONS))


class Growing:
    """Candidates of one prompt while they grow.

    Attributes:
        tokens: (n, T) int64; what lies beyond a candidate's length is 0.
        scores: (n, T) float32.
        log_probs: (n, T) float32.
        lengths: (n,) int64.
        reasons: (n,) int64, an index into `FINISH_REASONS`, or -1 while a candidate grows.
        kept: (n,) bool, not fallen behind at any pruning.
        computed: tokens that the network has read.
    """

    def __init__(self, request: Request, step_token: int | None) -> None:
        n = request.n
        self.request, self.step_token = request, step_token
        self.tokens = np.zeros((n, 0), np.int64)
        self.scores, self.log_probs = np.zeros((2, n, 0), np.float32)
        self.lengths, self.reasons = np.zeros(n, np.int64), np.full(n, -1)
        self.kept = np.ones(n, bool)
        self.computed = 0

    def add(self, numbers: Array, tokens: Array, scores: Array, log_probs: Array) -> None:
        """One token of each running candidate: all (rows,)."""
        # As in the graph: a token drawn from no distribution makes a candidate that cannot win.
        scores = np.where(np.isnan(log_probs), np.float32(np.nan), scores)
        for name, new in (("tokens", tokens), ("scores", scores), ("log_probs", log_probs)):
            old = getattr(self, name)
            column = np.zeros((len(old), 1), old.dtype)
            column[numbers, 0] = new
            setattr(self, name, np.concatenate([old, column], 1))
        self.lengths[numbers] += 1
        self.computed += len(numbers)
        self.reasons[numbers[np.isin(tokens, self.request.stop_tokens)]] = STOP

    def select(self) -> tuple[Array, int]:
        """Each candidate's score (n,) as it stands, NaN for a pruned one, and the best index, -1 if nothing can win."""
        mask = np.arange(self.tokens.shape[1]) < self.lengths[:, None]
        return self._select(mask & (self.reasons != PRUNED)[:, None])

    def _select(self, mask: Array) -> tuple[Array, int]:
        name = self.request.aggregation
        steps = self.tokens == self.step_token if is_stepwise(name) else np.ones_like(mask)
        plain = name.removeprefix("step_")
        arrays = (self.scores[:, None], mask[:, None].astype(np.int64), steps[:, None].astype(np.int64))
        found, best = aggregate(*arrays, plain)
        return found[:, 0], int(best[0])

    def prune(self) -> None:
        """Keep the best of those in the race, ended ones included, as `generate` does."""
        found, _ = self._select(np.arange(self.tokens.shape[1]) < self.lengths[:, None])
        self.kept = survivors(found, self.kept, self.request.prune_keep)
        self.reasons[(self.reasons < 0) & ~self.kept] = PRUNED


def survivors(scores: Array, kept: Array, keep: float) -> Array:
    """Who goes on after a pruning, (n,) bool: of those in the race, `kept`, the best share, rounded as in the graph."""
    ranked = np.where(kept & ~np.isnan(scores), scores, -np.inf)
    order = np.argsort(-ranked, kind="stable")
    limit = max(1, math.ceil(np.float32(kept.sum()) * np.float32(keep) - np.float32(1e-4)))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    going: Array = kept & (place < limit)
    return going


def clock(deadline: float | None) -> float | None:
    """When so many seconds from now have passed, on the clock of `time.monotonic`.

    Raises:
        InputError: they have no meaning.
    """
    if deadline is None:
        return None
    check_number("deadline", deadline, "seconds above 0", lambda seconds: seconds > 0)
    return time.monotonic() + float(deadline)


def grow(
    session: Callable[[str], Session], prompt: Array, request: Request, step_token: int | None, deadline: float | None
) -> Iterator[Growing]:
    """Generate; the same object is yielded after every step.

    Args:
        session: gives the session of a graph.
        prompt: (P,) int64.
        request: what to generate.
        step_token: ends a step, for the step aggregations.
        deadline: on the clock of `time.monotonic`, or None.
    """
    growing = Growing(request, step_token)
    prefill, decode = session("prefill"), session("decode")
    mask = np.ones((1, len(prompt)), np.int64)
    counts = {"num_candidates": np.array(request.n), "seed": np.array(request.seed)}
    first = prefill.values({"input_ids": prompt[None], "attention_mask": mask, **counts, **request.drawing()})
    fixed = {name: value for name, value in first.items() if name.startswith("prompt_") or name == "stream"}
    fixed |= decode.hold({"attention_mask": mask, **request.drawing()})
    tokens, log_probs = first["tokens"].numpy(), first["log_probs"].numpy()
    numbers = np.arange(request.n)
    shapes = {value.name: value.shape for value in decode.graph.inputs}
    names = [name for name in shapes if name.split(".")[0] in ("key", "value")]
    cache = decode.hold(
        {n: np.zeros((request.n, 1, shapes[n][2], 0, shapes[n][4]), np.float32) for n in names}  # type: ignore[arg-type]
    )
    for step in range(1, request.max_new_tokens + 1):
        found = decode.values(fixed | cache | decode.hold({"tokens": tokens, "numbers": numbers[:, None]}))
        growing.add(numbers, tokens[:, 0], found["scores"].numpy()[:, 0], log_probs[:, 0])
        if request.prune_every and step % request.prune_every == 0:
            growing.prune()
        running = growing.reasons < 0
        if step == request.max_new_tokens:
            growing.reasons[running] = LENGTH
        elif deadline is not None and time.monotonic() > deadline:
            growing.reasons[running] = DEADLINE
        yield growing
        rows = np.flatnonzero(growing.reasons[numbers] < 0)
        if not len(rows):
            return
        cache = {name: found[f"grown_{name}"] for name in names}
        if len(rows) < len(numbers):
            cache = decode.hold({name: value.numpy()[rows] for name, value in cache.items()})
        numbers, tokens, log_probs = numbers[rows], found["next_tokens"].numpy()[rows], found["log_probs"].numpy()[rows]


def generate_feeds(prompts: Array, mask: Array, request: Request, step_token: int | None) -> dict[str, Array]:
    """The inputs of `generate`: prompts and their mask (B, P) int64."""
    name = request.aggregation
    whole = {
        "num_candidates": request.n,
        "max_new_tokens": request.max_new_tokens,
        "seed": request.seed,
        "aggregation": aggregation_code(name),
        "step_token": step_token if is_stepwise(name) and step_token is not None else -1,
        "prune_every": request.prune_every,
    }
    return {
        "input_ids": prompts,
        "attention_mask": mask,
        "stop_tokens": np.array(request.stop_tokens, np.int64),
        "prune_keep": np.array(request.prune_keep, np.float32),
        **{key: np.array(value, np.int64) for key, value in whole.items()},
        **request.drawing(),
    }

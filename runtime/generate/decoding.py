"""Generation in a loop on the host: `prefill` once, then `decode` token by token. The same tokens as `generate`.

Unlike in a run of `generate`, the host sees every token: for streaming, a deadline, or a search.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..arrays import Array
from ..checks import check_number
from ..engine.session import HeldArray, Session
from ..selection.aggregate import aggregate_tokens, aggregation_code, is_stepwise
from .options import CheckedOptions
from .result import FINISH_REASONS

__all__ = [
    "DEADLINE",
    "LENGTH",
    "PRUNED",
    "STOP",
    "CachedRows",
    "Growing",
    "clock",
    "decode_all",
    "generate_feeds",
    "most_likely",
    "prefill",
    "survivors",
]

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
        self._ends = ends
        self.options, self.step_token = options, step_token
        self.tokens = np.zeros((n, 0), np.int64)
        self.scores, self.log_probs = np.zeros((2, n, 0), np.float32)
        self.lengths, self.reasons = np.zeros(n, np.int64), np.full(n, -1)
        self.kept = np.ones(n, bool)
        self.computed = 0
        self.top_tokens, self.top_log_probs = np.zeros((n, 0, 0), np.int64), np.zeros((n, 0, 0), np.float32)

    def add(self, numbers: Array, tokens: Array, scores: Array, log_probs: Array) -> None:
        """One token of each running candidate: all (rows,)."""
        # As in the graph: a token drawn from no distribution makes a candidate that cannot win.
        scores = np.where(np.isnan(log_probs), np.float32(np.nan), scores)
        self._append(numbers, tokens=tokens, scores=scores, log_probs=log_probs)
        self.lengths[numbers] += 1
        self.computed += len(numbers)
        self.reasons[numbers[np.isin(tokens, self.options.stop_tokens)]] = STOP
        if self._ends is not None:
            for number in numbers[self.reasons[numbers] < 0]:
                if self._ends(self.tokens[number, : self.lengths[number]]):
                    self.reasons[number] = STOP

    def add_top(self, numbers: Array, tokens: Array, log_probs: Array) -> None:
        """The most likely tokens at the place of the last token of some candidates: (rows, k) or (1, k)."""
        if not self.top_tokens.shape[2]:
            self.top_tokens, self.top_log_probs = (
                np.zeros((len(self.lengths), 0, tokens.shape[1]), array.dtype) for array in (tokens, log_probs)
            )
        self._append(numbers, top_tokens=tokens, top_log_probs=log_probs)

    def _append(self, numbers: Array, **arrays: Array) -> None:
        """Append a column to each of these arrays: 0 but for the candidates `numbers`."""
        for name, new in arrays.items():
            old = getattr(self, name)
            column = np.zeros((len(old), 1, *old.shape[2:]), old.dtype)
            column[numbers, 0] = new
            setattr(self, name, np.concatenate([old, column], 1))

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


def clock(deadline: float | None) -> float | None:
    """The time at which a deadline in seconds from now passes, on the clock of `time.monotonic`; None for none.

    Raises:
        InputError: the deadline is invalid.
    """
    if deadline is None:
        return None
    check_number("deadline", deadline, "seconds", gt=0)
    return time.monotonic() + float(deadline)


class CachedRows:
    """Rows that `decode` reads together, one token at a time, and their keys and values, which stay on the device.

    Args:
        session: of `decode`.
        fixed: the constant inputs, held where the session runs.
    """

    def __init__(self, session: Session, fixed: dict[str, HeldArray]) -> None:
        self._session, self._fixed = session, fixed
        shapes = {value.name: value.shape for value in session.graph.inputs}
        self._names = [name for name in shapes if name.split(".")[0] in ("key", "value")]
        self._widths = [(int(shapes[name][2]), int(shapes[name][4])) for name in self._names]
        self._cache: dict[str, HeldArray] = {}

    def blank(self) -> list[Array]:
        """Keys and values (1, G, 0, K) of a row that has read nothing."""
        return [np.zeros((1, heads, 0, size), np.float32) for heads, size in self._widths]

    def join(self, caches: Sequence[list[Array]]) -> None:
        """Append rows, given their keys and values; all rows must have read the same number of tokens."""
        arrays = {}
        for i, name in enumerate(self._names):
            stacked = np.stack([cache[i] for cache in caches])
            arrays[name] = np.concatenate([self._cache[name].numpy(), stacked]) if self._cache else stacked
        self._cache = self._session.hold(arrays)

    def read(self, tokens: Array, numbers: Array, *, logits: bool = False) -> dict[str, HeldArray]:
        """Let each row read a token and draw the next: both (rows, 1) int64; the outputs of `decode`, held."""
        feeds = self._fixed | self._cache | self._session.hold({"tokens": tokens, "numbers": numbers})
        outputs = self._session.values(feeds, logits=logits)
        self._cache = {name: outputs[f"grown_{name}"] for name in self._names}
        return outputs

    def keep(self, rows: Sequence[int] | Array) -> list[Array]:
        """Continue with these rows only; returns the keys and values that all rows had before."""
        arrays = [self._cache[name].numpy() for name in self._names]
        kept = {name: array[rows] for name, array in zip(self._names, arrays, strict=True)}
        self._cache = self._session.hold(kept) if len(rows) else {}
        return arrays


def prefill(
    session: Callable[[str], Session], prompt: Array, options: CheckedOptions, count: int, *, logits: bool = False
) -> tuple[dict[str, HeldArray], dict[str, HeldArray]]:
    """Read a prompt (P,) int64 and draw the first tokens of `count` candidates.

    Returns:
        the outputs of `prefill`, held, and the constant inputs of `decode`.
    """
    mask, drawing = np.ones((1, len(prompt)), np.int64), options.drawing()
    counts = {"num_candidates": np.array(count), "seed": np.array(options.seed)}
    feeds = {"input_ids": prompt[None], "attention_mask": mask, **counts, **drawing}
    outputs = session("prefill").values(feeds, logits=logits)
    fixed = {name: value for name, value in outputs.items() if name.startswith("prompt_") or name == "stream"}
    return outputs, fixed | session("decode").hold({"attention_mask": mask, **drawing})


def decode_all(
    session: Callable[[str], Session],
    prompt: Array,
    options: CheckedOptions,
    step_token: int | None,
    deadline: float | None,
    ends: Callable[[Array], bool] | None = None,
) -> Iterator[Growing]:
    """Generate; the same object is yielded after every token.

    Args:
        session: gives the session of a graph.
        prompt: (P,) int64.
        options: how to generate.
        step_token: ends a step, for the step aggregations.
        deadline: on the clock of `time.monotonic`, or None.
        ends: as in `Growing`.
    """
    growing = Growing(options, step_token, ends)
    with_top = options.top_log_probs > 0
    first, fixed = prefill(session, prompt, options, options.n, logits=with_top)
    top = most_likely(first["logits"].numpy(), options.top_log_probs) if with_top else None
    rows = CachedRows(session("decode"), fixed)
    rows.join([rows.blank()] * options.n)
    tokens, log_probs = first["tokens"].numpy(), first["log_probs"].numpy()
    # Without a scorer, the score of a token is the certainty of the distribution that it was drawn from.
    certainties = np.tile(first["certainty"].numpy(), (options.n, 1)) if "certainty" in first else None
    numbers = np.arange(options.n)
    for length in range(1, options.max_new_tokens + 1):
        outputs = rows.read(tokens, numbers[:, None], logits=with_top)
        scores = outputs["scores"].numpy() if certainties is None else certainties
        growing.add(numbers, tokens[:, 0], scores[:, 0], log_probs[:, 0])
        if top is not None:
            growing.add_top(numbers, *top)
        if options.prune_every and length % options.prune_every == 0:
            growing.prune()
        running = growing.reasons < 0
        if length == options.max_new_tokens:
            growing.reasons[running] = LENGTH
        elif deadline is not None and time.monotonic() > deadline:
            growing.reasons[running] = DEADLINE
        yield growing
        going = np.flatnonzero(growing.reasons[numbers] < 0)
        if not len(going):
            return
        if len(going) < len(numbers):
            rows.keep(going)
        numbers = numbers[going]
        tokens, log_probs = outputs["next_tokens"].numpy()[going], outputs["log_probs"].numpy()[going]
        if certainties is not None:
            certainties = outputs["certainties"].numpy()[going]
        top = most_likely(outputs["logits"].numpy()[going, 0], options.top_log_probs) if with_top else None


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


def generate_feeds(
    prompts: Array, mask: Array, options: Sequence[CheckedOptions], step_token: int | None
) -> dict[str, Array]:
    """The inputs of `generate`: prompts and their mask (B, P) int64, and the options of each prompt."""
    each = [_options_feeds(prompt_options, step_token) for prompt_options in options]
    # One value for all prompts where they agree, which is all that older artifacts take.
    shared = {name: _shared(np.stack([feeds[name] for feeds in each])) for name in each[0]}
    return {"input_ids": prompts, "attention_mask": mask, "stop_tokens": _stop_tokens(options), **shared}


def _options_feeds(options: CheckedOptions, step_token: int | None) -> dict[str, Array]:
    """The inputs of `generate` for the options of one prompt, each a scalar."""
    name = options.aggregation
    whole = {
        "num_candidates": options.n,
        "max_new_tokens": options.max_new_tokens,
        "seed": options.seed,
        "aggregation": aggregation_code(name),
        "step_token": step_token if is_stepwise(name) and step_token is not None else -1,
        "prune_every": options.prune_every,
    }
    feeds = {key: np.array(value, np.int64) for key, value in whole.items()}
    return feeds | {"prune_keep": np.array(options.prune_keep, np.float32)} | options.drawing()


def _shared(values: Array) -> Array:
    """The one value of (B), or all of them if they differ."""
    # Not `values[0]`, which is no array.
    first: Array = values[0, ...]
    return first if (values == first).all() else values


def _stop_tokens(options: Sequence[CheckedOptions]) -> Array:
    """The stop tokens of all prompts (stops) int64; those of one prompt have its number, from 1, in the upper half."""
    for_all = set.intersection(*(set(each.stop_tokens) for each in options))
    own = [(b << 32) + token for b, each in enumerate(options, 1) for token in {*each.stop_tokens} - for_all]
    return np.array([*sorted(for_all), *sorted(own)], np.int64)

"""Generation in a loop on the host: `prefill` once, then `decode` token by token. The same tokens as `generate`.

Unlike in a run of `generate`, the host sees every token, for streaming or a deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..arrays import Array
from ..checks import check_number
from ..engine.engine import Engine
from ..selection.aggregate import aggregation_code, is_stepwise
from .continuous import ContinuousBatch
from .growing import Growing
from .options import CheckedOptions
from .prompts import Joining, read_prompts
from .rows import GrownRows, Rows
from .static_rows import StaticRows, draws_plainly

__all__ = ["clock", "decode_all", "generate_feeds", "open_rows", "runs_static"]


def clock(deadline: float | None) -> float | None:
    """The time at which a deadline in seconds from now passes, on the clock of `time.monotonic`; None for none.

    Raises:
        InputError: the deadline is invalid.
    """
    if deadline is None:
        return None
    check_number("deadline", deadline, "seconds", gt=0)
    return time.monotonic() + float(deadline)


def open_rows(engine: Engine, options: CheckedOptions) -> Rows:
    """What runs the rows of a new batch, to which generations with these options belong.

    Raises:
        ArtifactError: the graph `decode` was written by an earlier version.
    """
    static = runs_static(engine, options)
    return StaticRows(engine.session) if static else GrownRows(engine.session("decode"))


def runs_static(engine: Engine, options: CheckedOptions) -> bool:
    """Whether a generation with these options runs in `decode_static`; only such may grow in one batch with it."""
    return engine.static_cache and draws_plainly(options)


def decode_all(
    engine: Engine,
    prompt: Array,
    options: CheckedOptions,
    step_token: int | None,
    deadline: float | None,
    ends: Callable[[Array], bool] | None = None,
) -> Iterator[Growing]:
    """Generate; the same object is yielded after every token.

    Args:
        engine: runs it.
        prompt: (P,) int64.
        options: how to generate.
        step_token: ends a step, for the step aggregations.
        deadline: on the clock of `time.monotonic`, or None.
        ends: as in `Growing`.
    """
    joining = Joining(prompt, options, ends, deadline)
    # First, for it refuses the graphs of earlier versions.
    rows = open_rows(engine, options)
    batch = ContinuousBatch(rows, step_token)
    (read,) = read_prompts(engine.session("prefill"), [joining], logits=options.top_log_probs > 0)
    growing = batch.join(read, joining)
    try:
        while batch.rows:
            batch.step()
            yield growing
    finally:
        # Whoever stops iterating leaves rows behind.
        rows.clear()


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

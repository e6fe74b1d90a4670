"""Rankings of several requests in one run of a graph, and each request's share of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import numpy as np

from bonnx.errors import InputError, NoWinnerError

from ..arrays import Array
from ..artifact.limits import estimate_memory
from ..batching import CALL_TOKENS, Shape, padded_tokens, plan
from ..checks import check_whole, is_list, shown
from ..engine.device import on_host
from ..engine.engine import Engine
from ..engine.prompt_cache import RANK_CACHED
from ..engine.session import Stop
from ..selection.aggregate import aggregation_code, is_stepwise
from ..selection.gate import objectives_by_name
from .request import RankRequest
from .result import Ranking, winner

__all__ = ["cost", "fits", "rank_all", "run_together"]

_OUTPUTS = ["scores", "candidate_scores", "best_index", "group_scores"]
# Inputs that `score` and `rank` share.
_SHARED_INPUTS = ("step_mask", "aggregation", "answer_ids", "vote")


def rank_all(engine: Engine, requests: Sequence[RankRequest], *, tokens: int = 2048) -> list[Ranking | NoWinnerError]:
    """Rank many requests, together where that costs less; scores differ from those of single runs by rounding only.

    Args:
        engine: runs them.
        requests: made by `read_request`.
        tokens: maximum size of a joint run, padding included.

    Returns:
        for each request its ranking, or the error that says it has no winner.

    Raises:
        InputError: not requests, or invalid bounds.
    """
    if not is_list(requests) or not all(isinstance(request, RankRequest) for request in requests):
        raise InputError(f"requests: expected a list of what `read_request` made; got {shown(requests)}")
    check_whole("tokens", tokens, 1)
    results: dict[int, Ranking | NoWinnerError] = {}
    for indices in plan(requests, fits(engine, tokens), cost(engine)) if requests else []:
        results |= zip(indices, run_together(engine, [requests[i] for i in indices]), strict=True)
    return [results[i] for i in range(len(requests))]


def fits(engine: Engine, tokens: int) -> Callable[[int, Shape], bool]:
    """For `plan`: whether a run stays within a number of tokens, the artifact's limits and the memory limit."""
    limits, memory = engine.manifest.limits, engine.memory_limit

    def fits(slots: int, shape: Shape) -> bool:
        if padded_tokens(slots, shape) > tokens or shape.candidates > limits.max_candidates:
            return False
        if shape.kept and slots > 1 and not engine.prompts.keeps(slots * shape.prompt):
            # Each slot has a copy of what the prompts begin with.
            return False
        if memory is None:
            return True
        return slots * estimate_memory(engine.manifest, shape.candidates, shape.prompt, shape.length) <= memory

    return fits


def cost(engine: Engine) -> Callable[[int, Shape], float]:
    """For `plan`: what a run costs, in tokens."""
    call = CALL_TOKENS[engine.provider]

    def cost(slots: int, shape: Shape) -> float:
        # The rest of prompts whose beginning is kept takes a run of its own.
        runs = 1 + (0 < shape.kept < shape.prompt)
        return runs * call + padded_tokens(slots, shape)

    return cost


def run_together(
    engine: Engine, requests: Sequence[RankRequest], stop: Stop | None = None
) -> list[Ranking | NoWinnerError]:
    """Rank requests of equal keys in one run: for each its ranking, or the error that says it has no winner."""
    slots: dict[Hashable, int] = {}
    filled: list[int] = []
    places = []
    for request in requests:
        slot = slots.setdefault(request.prompt_slot, len(slots))
        filled += [0] * (slot == len(filled))
        places.append((slot, slice(filled[slot], filled[slot] + len(request.values))))
        filled[slot] += len(request.values)
    suffix = engine.input_suffix
    feeds = _feeds(requests, places, len(slots), max(filled), suffix, engine.manifest.scoring.pad_token)
    beyond = _beyond(engine, requests[0])
    scores, candidate_scores, best, groups, *objectives = (
        _run(engine, requests[0], feeds, stop)
        if beyond is None
        else _run_apart(engine, requests[0], feeds, beyond, stop)
    )
    scores = scores.reshape(*candidate_scores.shape, -1)
    results: list[Ranking | NoWinnerError] = []
    for request, (slot, rows) in zip(requests, places, strict=True):
        index, group_scores = best[slot], groups[rows, slot]
        if len(request.values) < filled[slot] or beyond is not None:
            # The graph chose among the candidates of all requests in this slot, or among some of this one.
            ballot = request.ballot
            index, group_scores = ballot.choose(candidate_scores[rows, slot])
        try:
            ranking = _ranking(request, int(index), scores[rows, slot], candidate_scores[rows, slot], group_scores)
            if objectives:
                tokens = objectives[0].reshape(*scores.shape, -1)[rows, slot, : request.mask.shape[1]]
                rule = engine.manifest.scoring, tokens, request.mask, request.steps, request.aggregation
                ranking = replace(ranking, objectives=objectives_by_name(*rule))
            results.append(ranking)
        except NoWinnerError as e:
            results.append(e)
    return results


def _run(engine: Engine, first: RankRequest, feeds: dict[str, Array], stop: Stop | None) -> list[Array]:
    """Run the graph for `feeds`, which are those of `rank`; the outputs in the order of `_OUTPUTS`."""
    suffix = engine.input_suffix
    outputs = [*_OUTPUTS, "objectives"] if engine.manifest.scoring.gate_tokens else _OUTPUTS
    if not len(first.prompt):
        # The prompt's last token is merged with each candidate's first one, so no tokens are shared.
        if "score" in engine.manifest.graphs or engine.manifest.scoring.gate_tokens:
            return engine.session("score").run(_feeds_of_score(feeds, suffix), outputs, stop)
        feeds = {**feeds, **_padded_prompts(feeds, suffix)}
    if not first.kept:
        return engine.session("rank").run(feeds, outputs, stop)
    prompts = feeds.pop(f"prompt_{suffix}")
    if first.continues:
        cache = engine.prompts.read(first.prompt, stop)
    else:
        cache = engine.prompts.after(prompts, feeds["prompt_mask"], first.beginning, stop)
    values = engine.session(RANK_CACHED).values({**feeds, **cache}, stop=stop)
    return [on_host(values[name]) for name in outputs]


def _beyond(engine: Engine, request: RankRequest) -> Array | None:
    """Which candidates must run apart from the others, (N,) bool: those whose rotation changes with their length."""
    if request.joins or not engine.changes_at_limit or not len(request.prompt):
        return None
    beyond = len(request.prompt) + request.mask.sum(1) > engine.joint_limit
    return None if beyond.all() or not beyond.any() else beyond


def _run_apart(
    engine: Engine, request: RankRequest, feeds: dict[str, Array], beyond: Array, stop: Stop | None
) -> list[Array]:
    """As `_run`, in two runs, each of which takes the other's candidates for padding; the best index is neither's."""
    pair = [
        _run(engine, request, {**feeds, "candidate_mask": feeds["candidate_mask"] * part[:, None, None]}, stop)
        for part in (~beyond, beyond)
    ]
    # The indices of the best, third in order, are of another shape.
    return [
        near if i == 2 else np.where(beyond.reshape(-1, *(1,) * (near.ndim - 1)), far, near)
        for i, (near, far) in enumerate(zip(*pair, strict=True))
    ]


def _feeds(
    requests: Sequence[RankRequest],
    places: Sequence[tuple[int, slice]],
    slots: int,
    rows: int,
    suffix: str,
    pad_token: int,
) -> dict[str, Array]:
    """The inputs of `rank`: each request's arrays at its place, padding elsewhere."""
    first = requests[0]
    longest, length = (
        max(len(request.prompt) for request in requests),
        max(request.values.shape[1] for request in requests),
    )
    fill, more = (pad_token, ()) if first.values.ndim == 2 else (0, first.values.shape[2:])
    prompts = np.full((slots, longest, *more), fill, first.values.dtype)
    prompt_mask = np.zeros((slots, longest), np.int64)
    values = np.full((rows, slots, length, *more), fill, first.values.dtype)
    mask = np.zeros((rows, slots, length), np.int64)
    steps = np.ones((1, 1, 1), np.int64)
    if any(request.steps.shape != (1, 1) for request in requests):
        steps = np.zeros_like(mask)
    answers = np.full((rows, slots), -1, np.int64)
    for request, (slot, rows_of_one) in zip(requests, places, strict=True):
        tokens = request.values.shape[1]
        prompts[slot, : len(request.prompt)] = request.prompt
        prompt_mask[slot, : len(request.prompt)] = 1
        values[rows_of_one, slot, :tokens] = request.values
        mask[rows_of_one, slot, :tokens] = request.mask
        if steps.shape == mask.shape:
            steps[rows_of_one, slot, :tokens] = request.steps
        answers[rows_of_one, slot] = request.ballot.ids[:, 0]
    return {
        "aggregation": np.array(aggregation_code(first.aggregation), np.int64),
        f"prompt_{suffix}": prompts,
        "prompt_mask": prompt_mask,
        f"candidate_{suffix}": values,
        "candidate_mask": mask,
        "step_mask": steps,
        **first.ballot.feeds(),
        "answer_ids": answers,
    }


def _padded_prompts(feeds: dict[str, Array], suffix: str) -> dict[str, Array]:
    """Prompts without tokens as one position of padding, which is how `rank` takes them."""
    prompts, mask = feeds[f"prompt_{suffix}"], feeds["prompt_mask"]
    shape = len(prompts), 1, *prompts.shape[2:]
    return {f"prompt_{suffix}": np.zeros(shape, prompts.dtype), "prompt_mask": np.zeros(shape[:2], mask.dtype)}


def _feeds_of_score(feeds: dict[str, Array], suffix: str) -> dict[str, Array]:
    """The inputs of `rank` without a prompt, for `score`."""
    values, mask = feeds[f"candidate_{suffix}"][:, 0], feeds["candidate_mask"][:, 0]
    rows = {"input_ids" if suffix == "ids" else "inputs_embeds": values, "attention_mask": mask}
    rows["num_candidates"] = np.array(len(values), np.int64)
    return rows | {name: feeds[name] for name in _SHARED_INPUTS}


def _ranking(request: RankRequest, index: int, scores: Array, candidate_scores: Array, groups: Array) -> Ranking:
    """The result of a request, from its own scores (N, T), candidate scores (N,) and group scores (N,)."""
    best = winner(index, "candidates")
    rows = request.rows
    token_scores = [
        scores[i, skip : len(item)] for i, (skip, item) in enumerate(zip(rows.skip, rows.items, strict=True))
    ]
    step_scores = None
    if is_stepwise(request.aggregation):
        step_scores = [scores[i, : len(item)][request.steps[i, : len(item)] > 0] for i, item in enumerate(rows.items)]
    standing = request.ballot.count(candidate_scores, groups)
    return Ranking(
        best,
        request.candidates[best],
        candidate_scores,
        token_scores,
        request.aggregation,
        *standing,
        step_scores,
        rows.cut,
        rows.unreadable,
    )

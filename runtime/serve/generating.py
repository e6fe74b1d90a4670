"""Completions that the artifact generates itself, and the choice among them."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from starlette.requests import Request

from bonnx.errors import InputError

from ..arrays import Array
from ..engine.session import Stop
from ..generate.options import GenerateOptions
from ..generate.result import Candidate, Generation
from ..rank.result import winner
from ..search.result import SearchResult
from ..search.sampling import Adaptive
from ..search.search import search
from ..seeds import seed_after
from ..selection.vote import Ballot, Standing, make_ballot
from ..text.reader import Item
from ..upstream.completion import Completion
from .choosing import RESERVE, Chosen, Rule, sampling_cost
from .request_state import note
from .service import Service

__all__ = ["choose_from_artifact", "run_search", "search_cost", "standing_of"]


async def choose_from_artifact(
    service: Service,
    request: Request,
    prompt: Item,
    options: GenerateOptions,
    rule: Rule,
    on_state: Callable[[Generation], object] | None = None,
) -> Chosen:
    """Generate with the artifact, which scores what it generates.

    Args:
        service: generates.
        request: of the client.
        prompt: text or messages.
        options: how to generate, with the seed.
        rule: how to choose.
        on_state: called with the one completion while it grows.

    Raises:
        NoWinnerError: no completion can win.
        InputError: the prompt or an option is invalid.
    """
    if rule.truncate:
        raise InputError("truncate: a prompt that is generated from is never cut; leave it out")
    if not rule.samples:
        return await _search(service, request, prompt, options, rule)
    if isinstance(rule.runner, Adaptive) and rule.vote == "score":
        service.engine.check_scorer("bonnx.method 'adaptive'", "send a vote")
    _ballot(service, rule, [])
    sampled, saved = await _sample(service, request, prompt, options, rule, on_state)
    scores, ballot = _scores(sampled.candidates), _ballot(service, rule, sampled.candidates)
    chosen, groups = ballot.choose(scores)
    winner(chosen, "completions")
    count, tokens = len(sampled.candidates), sampled.computed_tokens
    service.metrics.sampled(rule.method, count, saved, tokens)
    return Chosen(
        _completions(service, sampled.candidates, options),
        scores,
        ballot.count(scores, groups),
        sampled.aggregation,
        sampled.prompt_tokens,
        tokens,
        (),
        sampling_cost(count, saved, tokens),
        sampled.candidates,
    )


async def _sample(
    service: Service,
    request: Request,
    prompt: Item,
    options: GenerateOptions,
    rule: Rule,
    on_state: Callable[[Generation], object] | None,
) -> tuple[Generation, int]:
    """All completions as one generation, and the number that `adaptive` has saved."""
    adaptive = rule.runner if isinstance(rule.runner, Adaptive) else None
    until = None if rule.deadline is None else time.monotonic() + rule.deadline
    total = Generation(-1, [], 0, 0, "")
    while (done := len(total.candidates)) < rule.best_of:
        count = rule.best_of - done
        if adaptive is not None:
            count = min(count, adaptive.batch)
        wave = cast(GenerateOptions, {**options, "n": count, "seed": seed_after(options["seed"], done)})
        if until is None and on_state is None:
            generation = await service.generate(request, prompt, wave)
        else:
            left = None if until is None else max(0.001, until - time.monotonic())
            generation = await service.cut(request, prompt, wave, left, on_state)
        total = Generation(
            -1,
            total.candidates + generation.candidates,
            generation.prompt_tokens,
            total.computed_tokens + sum(len(candidate.tokens) for candidate in generation.candidates),
            generation.aggregation,
        )
        candidates = total.candidates
        if adaptive is not None:
            voted = None if rule.vote == "score" else _ballot(service, rule, candidates).answers
            if adaptive.is_enough(functools.partial(_scores, candidates), voted):
                return total, rule.best_of - len(candidates)
        if until is not None and time.monotonic() > until:
            break
    return total, 0


def _scores(candidates: Sequence[Candidate]) -> Array:
    return np.array([candidate.score for candidate in candidates], np.float32)


def _ballot(service: Service, rule: Rule, candidates: Sequence[Candidate]) -> Ballot:
    texts = [candidate.text or "" for candidate in candidates]
    return make_ballot(rule.vote, rule.answers, texts, "completions", (), service.engine.manifest.scoring)


def _completions(service: Service, candidates: Sequence[Candidate], options: GenerateOptions) -> list[Completion]:
    """Candidates with the stop texts that ended them."""
    stops = [stop for stop in options.get("stop") or () if isinstance(stop, str)]
    completions = []
    for candidate in candidates:
        stopped_by = ""
        if candidate.finish_reason == "stop" and stops:
            written = "".join(service.engine.reader.pieces(candidate.tokens.tolist()))
            places = {stop: written.find(stop) for stop in stops if stop in written}
            stopped_by = min(places, key=lambda stop: places[stop], default="")
        completions.append(Completion(candidate.text or "", None, candidate.finish_reason, stopped_by))
    return completions


async def _search(service: Service, request: Request, prompt: Item, options: GenerateOptions, rule: Rule) -> Chosen:
    """Search with the artifact's tree."""
    if "top_log_probs" in options:
        raise InputError(f"top_logprobs: not available with bonnx.method '{rule.method}'; leave it out")
    result = await run_search(service, request, prompt, options, rule)
    standing = standing_of(result)
    # The method may choose by more than scores and votes.
    best = result.best_index
    standing = standing._replace(order=(best, *(i for i in standing.order if i != best)))
    return Chosen(
        _completions(service, result.candidates, options),
        _scores(result.candidates),
        standing,
        options.get("aggregation") or service.engine.manifest.scoring.aggregation,
        result.cost.prompt_tokens,
        result.cost.sampled_tokens,
        (),
        search_cost(result, rule),
        result.candidates,
    )


async def run_search(
    service: Service, request: Request, prompt: Item, options: GenerateOptions, rule: Rule
) -> SearchResult:
    """A search in one of the threads for them; it chooses from what there is at the deadline.

    Raises:
        QueueFullError: the maximum number of searches is under way.
        InputError: the prompt, an option or a setting is invalid.
        NoWinnerError: no completion can win.
    """
    read = await service.read_generation(request, prompt, cast(GenerateOptions, {**options, "n": rule.best_of}))
    left = service.until(request) - time.monotonic()
    seconds = max(0.001, min(left * (1 - RESERVE), left if rule.deadline is None else rule.deadline))
    settings = {**options, **dataclasses.asdict(rule.runner)}
    # `borda` is the vote of one method alone.
    vote = None if rule.vote == "borda" else rule.vote

    def work(stop: Stop) -> SearchResult:
        budget, answers = rule.best_of, rule.answers
        return search(
            service.engine, read.prompt, rule.method, budget, answers, vote, None, seconds, None, settings, stop
        )

    note(request, candidates=rule.best_of, tokens=len(read.prompt))
    result = await service.search(request, work)
    count, tokens = len(result.candidates), result.cost.sampled_tokens
    service.metrics.sampled(rule.method, count, _saved(result, rule), tokens)
    return result


def search_cost(result: SearchResult, rule: Rule) -> dict[str, object]:
    """What a search was spent on, and what an early end has saved."""
    saved, tokens = _saved(result, rule), result.cost.sampled_tokens
    return sampling_cost(len(result.candidates), saved, tokens) | dataclasses.asdict(result.cost)


def _saved(result: SearchResult, rule: Rule) -> int:
    is_cut = any(candidate.finish_reason == "deadline" for candidate in result.candidates)
    return rule.best_of - len(result.candidates) if rule.method == "adaptive" and not is_cut else 0


def standing_of(result: SearchResult | Generation, vote: str = "score") -> Standing:
    """The order, the margin and the votes of candidates.

    Args:
        result: a search, or a generation.
        vote: how the generation was chosen; a search says it itself.
    """
    vote = result.vote if isinstance(result, SearchResult) else vote
    scores = _scores(result.candidates)
    ballot = make_ballot("score", result.answers, [None] * len(scores), "candidates")
    groups = scores if result.group_scores is None else result.group_scores
    return dataclasses.replace(ballot, vote=vote).count(scores, groups)

"""Sample completions, from an upstream or from the artifact itself, and choose among them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
from starlette.requests import Request

from bonnx.errors import InputError, UpstreamError

from ..best_of_n.run import Run
from ..checks import ArgumentNames
from ..generate.options import GenerateOptions
from ..generate.result import Candidate, Generation
from ..rank.result import Ranking, winner
from ..search.sampling import Adaptive
from ..selection.vote import Standing, make_ballot
from ..text.reader import Item
from ..upstream.completion import Completion, Failure
from ..upstream.cost import SamplingCost
from ..upstream.events import CompletionChoice
from .ranking import ClientRequest
from .service import Service, note

if TYPE_CHECKING:
    from ..upstream.client import Upstream

__all__ = ["Chosen", "Rule", "choose_from_artifact", "choose_from_upstream"]

_NAMES = ArgumentNames("prompt", "completions", ("prompt", "completion", "completions"))
# Of a request's time, what is kept to score and to answer in.
_RESERVE = 0.1


@dataclass(frozen=True)
class Rule:
    """How many completions to sample, and how to choose.

    Attributes:
        best_of: number of completions; with `adaptive` the maximum.
        adaptive: ends the sampling early; None for all completions.
        vote: as in `Model.rank`.
        answers: `boxed` or `number`; None for no answers.
        aggregation: as in `Model.rank`.
        truncate: as in `Model.rank`.
        deadline: seconds after which the choice is made from what has come; None for the request's time limit.
    """

    best_of: int
    adaptive: Adaptive | None = None
    vote: str = "score"
    answers: str | None = None
    aggregation: str | None = None
    truncate: bool = False
    deadline: float | None = None


@dataclass(frozen=True)
class Chosen:
    """Completions and their order.

    Attributes:
        completions: all that came.
        scores: (completions,) float32; NaN for one that cannot win.
        standing: order, margin, answers and votes.
        aggregation: how a completion's scores became one.
        prompt_tokens: that were read to generate; None if the generator does not count them.
        completion_tokens: that were generated, of all completions; likewise.
        failures: of completions that did not come.
        candidates: tokens and log-probabilities of the completions, if the artifact made them.
    """

    completions: Sequence[Completion]
    scores: np.ndarray
    standing: Standing
    aggregation: str
    prompt_tokens: int | None
    completion_tokens: int | None
    failures: Sequence[Failure] = ()
    candidates: Sequence[Candidate] = field(default=(), repr=False)


async def choose_from_upstream(
    service: Service,
    upstream: Upstream,
    request: Request,
    prompt: Item,
    body: Mapping[str, object],
    rule: Rule,
    on_piece: Callable[[CompletionChoice], object] | None = None,
) -> Chosen:
    """Sample from the upstream; completions are scored here while others are under way.

    Args:
        service: scores.
        upstream: samples.
        request: of the client; when it leaves, the requests to the upstream are cancelled.
        prompt: text or messages, as the scorer reads them.
        body: of the requests to the upstream.
        rule: how to choose.
        on_piece: called with each piece of the one completion as it comes.

    Raises:
        UpstreamError: no completion came.
        NoWinnerError: no completion can win.
        InputError: the scorer cannot read the prompt or a completion.
    """
    scoring = service.engine.manifest.scoring
    # An invalid argument is refused before anything is sampled.
    make_ballot(rule.vote, rule.answers, [], "completions", (), scoring)
    left = service.until(request) - time.monotonic()
    seconds = min(left * (1 - _RESERVE), left if rule.deadline is None else rule.deadline)
    until, cost = time.monotonic() + seconds, SamplingCost()

    async def score(items: Sequence[Item]) -> Ranking:
        asked = ClientRequest(prompt, items, _NAMES)
        _, ranking = await service.rank(request, asked, aggregation=rule.aggregation, truncate=rule.truncate)
        return ranking

    def sample(n: int, first: int) -> AsyncGenerator[Completion | Failure, None]:
        return upstream.sample(body, n, first=first, until=until, cost=cost, on_piece=on_piece)

    run = Run(sample, score, rule.vote, rule.answers, scoring, cost, service.engine.reader.most_characters)
    choice = run.all_at_once(rule.best_of) if rule.adaptive is None else run.adaptively(rule.best_of, rule.adaptive)
    try:
        result = await service.unless_gone(request, choice)
    except UpstreamError as e:
        note(request, upstream_error=str(e))
        raise
    finally:
        note(request, completions=len(run.completions), failures=len(run.failures), upstream_requests=cost.requests)
    ranking = result.ranking
    standing = Standing(ranking.order, ranking.margin, ranking.answers, ranking.group_scores)
    return Chosen(
        result.completions,
        ranking.candidate_scores,
        standing,
        ranking.aggregation,
        cost.prompt_tokens,
        cost.completion_tokens,
        result.failures,
    )


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
    if rule.adaptive is not None and rule.vote == "score":
        service.engine.check_scorer("bonnx.method 'adaptive'", "send a vote")
    candidates: list[Candidate] = []
    prompt_tokens = computed_tokens = 0
    ballot = make_ballot(rule.vote, rule.answers, [], "completions", (), service.engine.manifest.scoring)
    scores, texts = np.zeros(0, np.float32), list[str]()
    aggregation = ""
    while len(candidates) < rule.best_of:
        count = rule.best_of - len(candidates)
        if rule.adaptive is not None:
            count = min(count, rule.adaptive.batch)
        wave = cast(GenerateOptions, {**options, "n": count, "seed": options["seed"] + len(candidates)})
        if rule.deadline is None and on_state is None:
            generation = await service.generate(request, prompt, wave)
        else:
            generation = await service.cut(request, prompt, wave, rule.deadline, on_state)
        candidates += generation.candidates
        aggregation = generation.aggregation
        prompt_tokens += generation.prompt_tokens
        computed_tokens += sum(len(candidate.tokens) for candidate in generation.candidates)
        scores = np.array([candidate.score for candidate in candidates], np.float32)
        texts = [candidate.text or "" for candidate in candidates]
        ballot = make_ballot(rule.vote, rule.answers, texts, "completions", (), service.engine.manifest.scoring)
        voted = None if rule.vote == "score" else ballot.answers
        if rule.adaptive is not None and rule.adaptive.is_enough(lambda scores=scores: scores, voted):  # type: ignore[misc]
            break
    chosen, groups = ballot.choose(scores)
    winner(chosen, "completions")
    completions = [Completion(text, None, c.finish_reason) for text, c in zip(texts, candidates, strict=True)]
    return Chosen(
        completions,
        scores,
        ballot.count(scores, groups),
        aggregation,
        prompt_tokens,
        computed_tokens,
        (),
        candidates,
    )

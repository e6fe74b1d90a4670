"""How to choose among completions, and the choice among those of an upstream."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request

from bonnx.errors import UpstreamError

from ..arrays import Array
from ..batching import Shape
from ..best_of_n.result import BestOfNResult
from ..best_of_n.run import Arrivals, Run
from ..best_of_n.steps import UpstreamTree, check_for_completions, check_step, search_by_steps, step_of
from ..checks import ArgumentNames
from ..engine.prompt_cache import PREFILL
from ..engine.session import Stop
from ..generate.result import Candidate
from ..rank.prepare import read_prompt
from ..rank.request import RankOptions
from ..rank.result import Ranking
from ..search.beam import Beam
from ..search.method import Method
from ..search.sampling import Adaptive, Sampling
from ..selection.vote import Standing, make_ballot
from ..text.reader import Item
from ..upstream.completion import Completion, Failure
from ..upstream.continuation import continued_body
from ..upstream.cost import SamplingCost
from ..upstream.events import CompletionChoice
from .limits import check_texts
from .ranking import ClientRequest
from .request_state import note, size, unless_gone
from .service import Service

if TYPE_CHECKING:
    from ..upstream.client import Upstream

__all__ = ["RESERVE", "Chosen", "Rule", "choose_from_upstream", "sampling_cost"]

_NAMES = ArgumentNames("prompt", "completions", ("prompt", "completion", "completions"))
# Of a request's time, what is kept to score and to answer in.
RESERVE = 0.1


@dataclass(frozen=True)
class Rule:
    """How many completions to sample, and how to choose.

    Attributes:
        best_of: number of completions; with `adaptive` the maximum.
        method: name of the search method.
        runner: the method with its settings.
        vote: as in `Model.rank`.
        answers: `boxed` or `number`; None for no answers.
        aggregation: as in `Model.rank`.
        truncate: as in `Model.rank`.
        deadline: seconds after which the choice is made from what has come; None for the request's time limit.
        step: the text that ends a step of an upstream's completion; None for the scorer's.
    """

    best_of: int
    method: str = "best_of_n"
    runner: Method = field(default_factory=Sampling)
    vote: str = "score"
    answers: str | None = None
    aggregation: str | None = None
    truncate: bool = False
    deadline: float | None = None
    step: str | None = None

    @property
    def samples(self) -> bool:
        """Whether completions are sampled side by side, from beginning to end."""
        return type(self.runner) in (Sampling, Adaptive)

    @property
    def samples_one(self) -> bool:
        """Whether there is nothing to choose from."""
        return self.best_of == 1 and self.samples


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
        cost: what was spent and saved, for the answer.
        candidates: tokens and log-probabilities of the completions, if the artifact made them.
        unscored: why some completions have no score.
    """

    completions: Sequence[Completion]
    scores: np.ndarray
    standing: Standing
    aggregation: str
    prompt_tokens: int | None
    completion_tokens: int | None
    failures: Sequence[Failure] = ()
    cost: Mapping[str, object] = field(default_factory=dict)
    candidates: Sequence[Candidate] = field(default=(), repr=False)
    unscored: Mapping[int, str] = field(default_factory=dict)


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
    check_for_completions(rule.method, rule.runner)
    # An invalid argument is refused before anything is sampled.
    make_ballot(rule.vote, rule.answers, [], "completions", (), service.engine.manifest.scoring)
    run, choice = _start(service, upstream, request, prompt, body, rule, on_piece)
    try:
        result = await unless_gone(request, choice)
    except UpstreamError as e:
        note(request, upstream_error=str(e))
        raise
    finally:
        note(request, completions=len(run.completions), failures=len(run.failures), upstream_requests=run.cost.requests)
    ranking = result.ranking
    service.metrics.sampled(rule.method, len(result.completions), result.saved, run.cost.completion_tokens)
    return Chosen(
        result.completions,
        ranking.candidate_scores,
        Standing(ranking.order, ranking.margin, ranking.answers, ranking.group_scores),
        ranking.aggregation,
        run.cost.prompt_tokens,
        run.cost.completion_tokens,
        result.failures,
        sampling_cost(len(result.completions), result.saved, run.cost.completion_tokens)
        | {"requests": run.cost.requests},
        unscored=ranking.unreadable,
    )


def _start(
    service: Service,
    upstream: Upstream,
    request: Request,
    prompt: Item,
    body: Mapping[str, object],
    rule: Rule,
    on_piece: Callable[[CompletionChoice], object] | None,
) -> tuple[Run, Coroutine[Any, Any, BestOfNResult]]:
    """A run of best-of-N, and its result."""
    left = service.until(request) - time.monotonic()
    seconds = min(left * (1 - RESERVE), left if rule.deadline is None else rule.deadline)
    until, cost = time.monotonic() + seconds, SamplingCost()

    async def score(items: Sequence[Item], *, partial: bool = False) -> Ranking:
        asked = ClientRequest(prompt, items, _NAMES)
        options: RankOptions = {"aggregation": rule.aggregation, "truncate": rule.truncate, "partial": partial}
        return (await service.rank(request, asked, **options))[1]

    def sample(n: int, first: int) -> Arrivals:
        return upstream.sample(body, n, first=first, until=until, cost=cost, on_piece=on_piece)

    def sample_steps(text: str, n: int, first: int, step: str | None, cost: SamplingCost, **how: Any) -> Arrivals:
        return upstream.sample(continued_body(body, text, step, **how), n, first=first, until=until, cost=cost)

    run = Run(
        sample,
        score,
        rule.vote,
        rule.answers,
        service.engine.manifest.scoring,
        cost,
        service.engine.reader.most_characters,
        lambda: _prepare(service, request, prompt),
    )
    if isinstance(rule.runner, Beam):
        step = check_step(rule.method, rule.step or step_of(service.engine))
        tree = UpstreamTree(run, sample_steps, functools.partial(score, partial=True), step, until)
        return run, search_by_steps(tree, rule.runner, rule.method, rule.best_of)
    if isinstance(rule.runner, Adaptive):
        return run, run.adaptively(rule.best_of, rule.runner)
    return run, run.all_at_once(rule.best_of, rule.method)


async def _prepare(service: Service, request: Request, prompt: Item) -> None:
    """Compute a prompt before its completions are there, if it can be kept.

    Raises:
        InputError: it is invalid or too long.
    """
    check_texts([ClientRequest(prompt, (), _NAMES)], service.engine, service.settings, truncate=False)
    values = await service.aside(lambda: read_prompt(service.engine, prompt), request, size(request))
    if values is None:
        return

    def run(stop: Stop) -> Sequence[Array]:
        service.engine.prompts.read(values, stop)
        return ()

    await service.call(request, PREFILL, run, Shape(1, len(values), 0))


def sampling_cost(completions: int, saved: int, tokens: int | None) -> dict[str, object]:
    """What was sampled, and what an early end has saved.

    Args:
        completions: number that came.
        saved: number that was not asked for, because more were not worth their price.
        tokens: of all completions; None if they are not counted.
    """
    cost: dict[str, object] = {"completions": completions, "saved_completions": saved}
    if tokens is not None and completions:
        # If they were as long as the others.
        cost["estimated_saved_tokens"] = round(saved * tokens / completions)
    return cost

"""`/v1/best-of-n`: choose the best of given candidates, or of n that are generated now."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, ClassVar, Literal, TypeAlias, cast

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from bonnx.errors import InputError

from ...artifact.manifest import Aggregation
from ...generate.options import GenerateOptions
from ...generate.result import Generation
from ...generate.vote import check_vote, choose_by_vote
from ...rank.result import Ranking, winner
from ...results import to_json
from ...search.methods import SETTINGS, vote_of
from ...search.result import SearchResult
from ...search.sampling import Sampling
from ..answer import answer_head, check_model, event_stream, json_response, to_runtime, warned
from ..choosing import Rule
from ..errors import encode, to_api_error
from ..generating import run_search, search_cost, standing_of
from ..method_fields import method_of, with_method
from ..ranking import ClientRequest, Outcome, TokenUsage
from ..schemas import FAIL_FAST, MOST_ITEMS, TRUNCATE, Candidate, Prompt, RequestBody, Text, option_field, with_options
from ..service import Service
from ..streaming import GenerationStream

__all__ = ["add"]

# Every token of every candidate is compared with each of them.
_MOST_STOPS = 1024
_Answer: TypeAlias = str | Annotated[int, Field(ge=-(2**63), lt=2**63)] | None
_SAMPLING = ("n", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "aggregation")


@with_method()
@with_options("max_new_tokens", "temperature", "top_k", "top_p", "seed")
class BestOfNBody(RequestBody):
    """Candidates to choose from, or how many to generate."""

    elsewhere: ClassVar[dict[str, str]] = {
        "messages": "send them as 'prompt'",
        "max_tokens": "send it as 'max_new_tokens'",
        "truncate_prompt_tokens": TRUNCATE.format("a prompt"),
    }
    prompt: Prompt = Field(
        description="expected text, messages, token ids, or embeddings as a list of lists of numbers"
    )
    candidates: Annotated[list[Candidate], FAIL_FAST, Field(min_length=1, max_length=MOST_ITEMS)] | None = Field(
        None,
        description="expected a list of at least one: text, messages, a list of steps, token ids or embeddings each",
    )
    n: int | None = option_field(
        "n", default=None, description="completions to generate, if there are no candidates: the budget of the method"
    )
    model: str | None = None
    aggregation: Aggregation | None = None
    vote: Literal["score", "weighted", "majority"] | None = Field(
        None, description="how to choose; by default by score, or as the method does"
    )
    answers: Literal["boxed", "number"] | Annotated[list[_Answer], FAIL_FAST] | None = Field(
        None, description="expected what each candidate votes for, or 'boxed' or 'number' to find it in their texts"
    )
    partial: bool = Field(False, description="candidates are not finished: no end token is appended")
    truncate: bool = Field(False, description="leave out the beginning of a prompt that is too long")
    token_scores: bool = Field(False, description="also return the score of every token")
    stop: Text | Annotated[list[Text | int], FAIL_FAST, Field(max_length=_MOST_STOPS)] | None = Field(
        None, description=f"expected a text, or a list of at most {_MOST_STOPS} texts or token ids"
    )
    stream: bool = Field(False, description="server-sent events while it generates")
    deadline: float | None = Field(None, gt=0, description="seconds after which unfinished candidates are cut off")


def add(routes: APIRouter, service: Service) -> None:
    """Declare the endpoint."""

    @routes.post("/v1/best-of-n", name="best_of_n")
    async def best_of_n(request: Request, body: BestOfNBody) -> Response:
        """Choose the best of given candidates, or of n that are generated now."""
        check_model(service, body.model)
        answer = await _answer(service, request, body)
        if isinstance(answer, dict):
            return json_response(answer)
        return event_stream(answer)


async def _answer(service: Service, request: Request, body: BestOfNBody) -> dict[str, object] | AsyncIterator[bytes]:
    """The choice, or the events of a generation that is streamed."""
    if (body.candidates is None) == (body.n is None):
        got = "both" if body.n is not None else "neither"
        raise InputError(f"expected candidates to choose from, or n of them to generate; got {got}")
    if body.candidates is not None:
        return await _ranked(service, request, body)
    rule = _rule(body)
    options = cast(GenerateOptions, {name: getattr(body, name) for name in _SAMPLING if name in body.model_fields_set})
    if isinstance(body.stop, str):
        options["stop"] = [body.stop]
    prompt = to_runtime(body.prompt, "prompt")
    check_vote("score" if rule.vote == "borda" else rule.vote, rule.answers, service.engine.manifest.scoring)
    if type(rule.runner) is not Sampling:
        if body.stream:
            raise InputError(f"stream: not available with method '{rule.method}'; leave one of them out")
        del options["n"]
        result = await run_search(service, request, prompt, options, rule)
        aggregation = body.aggregation or service.engine.manifest.scoring.aggregation
        return _generated(service, body, rule, result, aggregation) | {"cost": search_cost(result, rule)}
    if body.stream:
        return _events(await service.watch(request, prompt, options, body.deadline), service, body, rule)
    if body.deadline is not None:
        generation = await service.cut(request, prompt, options, body.deadline)
    else:
        generation = await service.generate(request, prompt, options)
    service.metrics.sampled(rule.method, len(generation.candidates), 0, None)
    return _voted(service, body, rule, generation)


def _rule(body: BestOfNBody) -> Rule:
    """How to generate candidates and to choose among them.

    Raises:
        InputError: a field that belongs to given candidates only, or fields that do not go together.
    """
    for field in ("partial", "truncate"):
        if getattr(body, field):
            raise InputError(f"{field}: belongs to given candidates; leave it out to generate")
    if isinstance(body.answers, list):
        raise InputError("answers: a list belongs to given candidates; expected 'boxed' or 'number' to generate")
    method, runner = method_of(body)
    vote = vote_of(method, body.vote, has_answers=body.answers is not None)
    if vote in ("weighted", "majority") and body.answers is None:
        raise InputError(f"vote: '{vote}' needs answers: 'boxed' or 'number'")
    assert body.n is not None
    return Rule(body.n, method, runner, vote, body.answers, body.aggregation, deadline=body.deadline)


async def _ranked(service: Service, request: Request, body: BestOfNBody) -> dict[str, object]:
    for field in (*_SAMPLING[1:-1], "deadline", "method", *SETTINGS):
        if field in body.model_fields_set:
            raise InputError(f"{field}: belongs to generation; leave it out with candidates")
    if body.stream:
        raise InputError("stream: given candidates are ranked at once; leave it out")
    vote = body.vote or "score"
    if vote != "score" and body.answers is None:
        raise InputError(f"vote: '{vote}' needs answers: a list with one for each candidate, 'boxed' or 'number'")
    assert body.candidates is not None
    items = [to_runtime(candidate, f"candidates[{i}]") for i, candidate in enumerate(body.candidates)]
    outcome, ranking = await service.rank(
        request, ClientRequest(to_runtime(body.prompt, "prompt"), items),
        aggregation=body.aggregation, partial=body.partial, truncate=body.truncate,
        vote=vote, answers=body.answers,
    )  # fmt: skip
    best = items[ranking.best_index]
    answer = {
        "best_index": ranking.best_index,
        "best": to_json(best),
        "margin": ranking.margin,
        "order": ranking.order,
        "aggregation": ranking.aggregation,
        "vote": vote,
        "candidates": [_candidate(outcome, ranking, body, i) for i in range(len(items))],
        "usage": outcome.usage.to_dict(),
    }
    return answer_head(service) | answer | warned(outcome.warnings)


def _candidate(outcome: Outcome, ranking: Ranking, body: BestOfNBody, i: int) -> dict[str, object]:
    entry: dict[str, object] = {"index": i, "score": outcome.scores[i], "tokens": len(ranking.scores[i])}
    if ranking.answers is not None:
        entry["answer"] = ranking.answers[i]
    if ranking.group_scores is not None:
        entry["group_score"] = to_json(ranking.group_scores[i])
    if ranking.objectives is not None:
        entry["objectives"] = {name: to_json(values[i]) for name, values in ranking.objectives.items()}
    if ranking.step_scores is not None:
        entry["step_scores"] = to_json(ranking.step_scores[i])
    if body.token_scores:
        entry["token_scores"] = to_json(ranking.scores[i])
    return entry


def _voted(service: Service, body: BestOfNBody, rule: Rule, generation: Generation) -> dict[str, object]:
    """A finished generation, chosen by its vote."""
    chosen = choose_by_vote(generation, rule.vote, rule.answers, service.engine.manifest.scoring)
    return _generated(service, body, rule, chosen, generation.aggregation)


def _generated(
    service: Service, body: BestOfNBody, rule: Rule, result: Generation | SearchResult, aggregation: str
) -> dict[str, object]:
    """Generated candidates, finished or not."""
    best = result.candidates[result.best_index] if result.best_index >= 0 else None
    candidates = []
    for i, c in enumerate(result.candidates):
        entry: dict[str, object] = {"index": i, "text": c.text, "score": c.score, "tokens": len(c.tokens)}
        entry["finish_reason"] = c.finish_reason
        if result.answers is not None:
            entry["answer"] = result.answers[i]
        if result.group_scores is not None and rule.vote != "score":
            entry["group_score"] = to_json(result.group_scores[i])
        if c.text is None:
            entry["token_ids"] = c.tokens.tolist()
        if body.token_scores:
            entry["token_scores"] = to_json(c.scores)
        candidates.append(entry)
    if isinstance(result, SearchResult):
        usage = TokenUsage(result.cost.prompt_tokens, result.cost.sampled_tokens)
    else:
        usage = TokenUsage(result.prompt_tokens, result.computed_tokens)
    return answer_head(service) | {
        "best_index": result.best_index,
        "best": None if best is None else best.tokens.tolist() if best.text is None else best.text,
        "margin": standing_of(result, rule.vote).margin,
        "aggregation": aggregation,
        "method": rule.method,
        "vote": rule.vote,
        "candidates": candidates,
        "usage": usage.to_dict(),
    }


async def _events(states: GenerationStream, service: Service, body: BestOfNBody, rule: Rule) -> AsyncIterator[bytes]:
    """Events of one answer, under its id: `progress` while candidates grow, then `result`, or `error`."""
    last, head = None, answer_head(service)
    try:
        async for state in states:
            if last is not None:
                yield _event("progress", _generated(service, body, rule, last, last.aggregation) | head)
            last = state
        assert last is not None
        winner(last.best_index, "candidates")
        yield _event("result", _voted(service, body, rule, last) | head)
    except Exception as e:
        error = to_api_error(e)
        if error is None:
            raise
        yield _event("error", msgspec.json.decode(error.response("/v1/").body))


def _event(name: str, value: object) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + encode(value) + b"\n\n"

"""`/v1/score`: scores of pairs of texts."""

from __future__ import annotations

import time
from typing import Annotated, ClassVar

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from bonnx.errors import InputError

from ...artifact.manifest import Aggregation
from ...checks import ArgumentNames
from ..answer import answer_head, check_model, json_response, warned
from ..ranking import ClientRequest, TokenUsage
from ..schemas import INSTRUCTION, MOST_ITEMS, RAW_SCORES, TRUNCATE, RequestBody, Text, Texts
from ..service import Service

__all__ = ["add"]

_NOUNS = ("text_1", "text_2", "texts of text_2")
_TEXTS = "expected a text, or a list of at least one"


class ScoreBody(RequestBody):
    """As vLLM takes it: one text against many, or as many pairs."""

    elsewhere: ClassVar[dict[str, str]] = {
        "truncate_prompt_tokens": TRUNCATE.format("a text_1"),
        "queries": "send them as 'text_1'",
        "documents": "send them as 'text_2'",
        "items": "send them as 'text_2'",
        "data_1": "send it as 'text_1'",
        "data_2": "send it as 'text_2'",
        "activation": RAW_SCORES,
        "use_activation": RAW_SCORES,
    }
    text_1: Text | Annotated[Texts, Field(min_length=1, max_length=MOST_ITEMS)] = Field(description=_TEXTS)
    text_2: Text | Annotated[Texts, Field(min_length=1, max_length=MOST_ITEMS)] = Field(description=_TEXTS)
    model: str | None = None
    instruction: Text | None = Field(None, description=INSTRUCTION)
    aggregation: Aggregation | None = None
    truncate: bool = Field(False, description="leave out the beginning of a text_1 that is too long")


def add(routes: APIRouter, service: Service) -> None:
    """Declare the endpoint."""

    async def score(request: Request, body: ScoreBody) -> Response:
        """Score pairs of texts, as vLLM's server does."""
        check_model(service, body.model)
        return json_response(await _answer(service, request, body))

    for path in ("/v1/score", "/score"):
        routes.post(path, name="score", include_in_schema=path == "/v1/score")(score)


async def _answer(service: Service, request: Request, body: ScoreBody) -> dict[str, object]:
    """vLLM's form of an answer; the score of a pair that cannot be scored is null."""
    outcomes = await service.rank_all(request, _pairs(body), aggregation=body.aggregation, truncate=body.truncate)
    scores = [score for outcome in outcomes for score in outcome.scores]
    warnings = [warning for outcome in outcomes for warning in outcome.warnings]
    answer = {
        "object": "list",
        "created": int(time.time()),
        "data": [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)],
        "usage": sum((outcome.usage for outcome in outcomes), TokenUsage(0)).to_dict(),
    }
    return answer_head(service) | answer | warned(warnings)


def _pairs(body: ScoreBody) -> list[ClientRequest]:
    first = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    names = ["text_2"] if isinstance(body.text_2, str) else [f"text_2[{i}]" for i in range(len(second))]
    if len(first) == 1:
        prompt = "text_1" if isinstance(body.text_1, str) else "text_1[0]"
        return [ClientRequest(first[0], second, ArgumentNames(prompt, "text_2", _NOUNS, names), body.instruction)]
    if len(first) != len(second):
        raise InputError(f"text_1 has {len(first)} texts and text_2 {len(second)}; expected one, or as many")
    return [
        ClientRequest(
            prompt, [text], ArgumentNames(f"text_1[{i}]", "text_2", _NOUNS, [f"text_2[{i}]"]), body.instruction
        )
        for i, (prompt, text) in enumerate(zip(first, second, strict=True))
    ]

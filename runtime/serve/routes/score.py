"""`/v1/score`: scores of pairs of texts."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from bonnx.errors import InputError

from ...checks import ArgumentNames
from ..ranking import ClientRequest, Usage
from ..schemas import Score
from ..service import Service
from .answer import answer_head, check_model, json_response, warned

__all__ = ["add"]

_NOUNS = ("text_1", "text_2", "texts of text_2")


def add(routes: APIRouter, service: Service) -> None:
    """Declare the endpoint."""

    async def score(request: Request, body: Score) -> Response:
        """Score pairs of texts, as vLLM's server does."""
        check_model(service, body.model)
        return json_response(await _answer(service, request, body))

    for path in ("/v1/score", "/score"):
        routes.post(path, name="score", include_in_schema=path == "/v1/score")(score)


async def _answer(service: Service, request: Request, body: Score) -> dict[str, Any]:
    """As vLLM answers; a pair that cannot be scored has null."""
    asked = _pairs(body)
    results = await service.rank_all(request, asked, aggregation=body.aggregation, truncate=body.truncate)
    scores = [score for found in results for score in found.scores]
    warnings = [warning for found in results for warning in found.warnings]
    answer = {
        "object": "list",
        "created": int(time.time()),
        "data": [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)],
        "usage": sum((found.usage for found in results), Usage(0)).to_dict(),
    }
    return answer_head(service) | answer | warned(warnings)


def _pairs(body: Score) -> list[ClientRequest]:
    first = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    names = ["text_2"] if isinstance(body.text_2, str) else [f"text_2[{i}]" for i in range(len(second))]
    if len(first) == 1:
        prompt = "text_1" if isinstance(body.text_1, str) else "text_1[0]"
        return [ClientRequest(first[0], second, ArgumentNames(prompt, "text_2", _NOUNS, names))]
    if len(first) != len(second):
        raise InputError(f"text_1 has {len(first)} texts and text_2 {len(second)}; expected one, or as many")
    return [
        ClientRequest(prompt, [text], ArgumentNames(f"text_1[{i}]", "text_2", _NOUNS, [f"text_2[{i}]"]))
        for i, (prompt, text) in enumerate(zip(first, second, strict=True))
    ]

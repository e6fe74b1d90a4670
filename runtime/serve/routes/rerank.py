"""`/v1/rerank`: order documents by how well each answers a query."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ...checks import ArgumentNames
from ..ranking import ClientRequest
from ..schemas import Document, Rerank
from ..service import Service
from .answer import answer_head, check_model, json_response, to_runtime

__all__ = ["add"]

# Cohere bills so many documents as one search.
_SEARCH_UNIT = 100
_NAMES = ArgumentNames("query", "documents", ("query", "document", "documents"))


def add(routes: APIRouter, service: Service) -> None:
    """Declare the endpoint."""

    async def rerank(request: Request, body: Rerank) -> Response:
        """Order documents by how well each answers the query, as Cohere's and vLLM's servers do."""
        check_model(service, body.model)
        return json_response(await _answer(service, request, body))

    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        routes.post(path, name="rerank", include_in_schema=path == "/v1/rerank")(rerank)


async def _answer(service: Service, request: Request, body: Rerank) -> dict[str, Any]:
    """As Cohere answers, whose scores are numbers: a document that has none is left out, and a warning names it."""
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    asked = ClientRequest(to_runtime(body.query, "query"), texts, _NAMES)
    found, ranking = await service.rank(request, asked, aggregation=body.aggregation, truncate=body.truncate)
    results: list[dict[str, Any]] = []
    for i in [i for i in ranking.order if not math.isnan(found.scores[i])][: body.top_n]:
        result: dict[str, Any] = {"index": i, "relevance_score": found.scores[i]}
        results.append(result | ({"document": _document(body.documents[i])} if body.return_documents else {}))
    meta: dict[str, Any] = {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": math.ceil(len(texts) / _SEARCH_UNIT)},
        "tokens": {"input_tokens": found.usage.prompt, "output_tokens": 0},
    }
    if found.warnings:
        meta["warnings"] = found.warnings
    return answer_head(service) | {"results": results, "usage": found.usage.to_dict(), "meta": meta}


def _document(document: str | Document) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else document.model_dump()

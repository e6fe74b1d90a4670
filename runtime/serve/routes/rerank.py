"""`/v1/rerank`: order documents by how well each answers a query."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from ...artifact.manifest import Aggregation
from ...checks import ArgumentNames
from ..answer import answer_head, check_model, json_response, to_runtime
from ..ranking import ClientRequest
from ..schemas import FAIL_FAST, MOST_ITEMS, RAW_SCORES, TRUNCATE, Messages, RequestBody, Text
from ..service import Service

__all__ = ["add"]

# Cohere bills this many documents as one search.
_SEARCH_UNIT = 100
_NAMES = ArgumentNames("query", "documents", ("query", "document", "documents"))
_NOT_CUT = "documents are never cut here; leave it out, and send documents that fit"


class Document(BaseModel):
    """A text to rank; its other fields come back with `return_documents`."""

    model_config = ConfigDict(extra="allow")
    text: Text


class RerankBody(RequestBody):
    """As Cohere and vLLM take it."""

    elsewhere: ClassVar[dict[str, str]] = {
        "max_tokens_per_doc": _NOT_CUT,
        "max_chunks_per_doc": _NOT_CUT,
        "truncate_prompt_tokens": TRUNCATE.format("a query"),
        "truncation_direction": TRUNCATE.format("a query"),
        "rank_fields": "a document is ranked by its 'text' alone; leave it out",
        "relevant_spans": "none are looked for here; leave it out",
        "priority": "requests run in the order in which they come; leave it out",
        "texts": "send them as 'documents'; the answer is in the form of Cohere, not of Text Embeddings Inference",
        "return_text": 'send "return_documents": true',
        "raw_scores": RAW_SCORES,
        "activation": RAW_SCORES,
        "use_activation": RAW_SCORES,
    }
    query: Text | Messages = Field(description="expected text, or messages")
    documents: Annotated[list[Text | Document], FAIL_FAST] = Field(
        min_length=1, max_length=MOST_ITEMS, description="expected a list of at least one text, or objects with a text"
    )
    top_n: int | None = Field(None, ge=1, description="how many of the best to return; by default all")
    return_documents: bool = False
    model: str | None = Field(None, description="name of this server's model; may be left out")
    aggregation: Aggregation | None = None
    truncate: bool = Field(False, description="leave out the beginning of a query that is too long")


def add(routes: APIRouter, service: Service) -> None:
    """Declare the endpoint."""

    async def rerank(request: Request, body: RerankBody) -> Response:
        """Order documents by how well each answers the query, as Cohere's and vLLM's servers do."""
        check_model(service, body.model)
        return json_response(await _answer(service, request, body))

    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        routes.post(path, name="rerank", include_in_schema=path == "/v1/rerank")(rerank)


async def _answer(service: Service, request: Request, body: RerankBody) -> dict[str, object]:
    """Cohere's form of an answer, in which scores are numbers: a document without one is left out, with a warning."""
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    ranked = ClientRequest(to_runtime(body.query, "query"), texts, _NAMES)
    outcome, ranking = await service.rank(request, ranked, aggregation=body.aggregation, truncate=body.truncate)
    results: list[dict[str, object]] = []
    for i in [i for i in ranking.order if not math.isnan(outcome.scores[i])][: body.top_n]:
        result: dict[str, object] = {"index": i, "relevance_score": outcome.scores[i]}
        results.append(result | ({"document": _document(body.documents[i])} if body.return_documents else {}))
    meta: dict[str, object] = {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": math.ceil(len(texts) / _SEARCH_UNIT)},
        "tokens": {"input_tokens": outcome.usage.prompt, "output_tokens": 0},
    }
    if outcome.warnings:
        meta["warnings"] = outcome.warnings
    return answer_head(service) | {"results": results, "usage": outcome.usage.to_dict(), "meta": meta}


def _document(document: str | Document) -> dict[str, object]:
    return {"text": document} if isinstance(document, str) else document.model_dump()

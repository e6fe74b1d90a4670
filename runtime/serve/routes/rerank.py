"""`/v1/rerank`: order documents by how well each answers a query.

Cohere's, vLLM's and Jina's clients send them as `documents`, those of Text Embeddings Inference as `texts`; each gets
the answer that it expects.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from bonnx.errors import InputError

from ...artifact.manifest import Aggregation
from ...checks import ArgumentNames
from ..answer import answer_head, check_model, json_response, to_runtime
from ..ranking import ClientRequest
from ..schemas import FAIL_FAST, INSTRUCTION, MOST_ITEMS, RAW_SCORES, TRUNCATE, Messages, RequestBody, Text, Texts
from ..service import Service
from ..text_embeddings import tei_score

__all__ = ["add"]

# Cohere bills this many documents as one search.
_SEARCH_UNIT = 100
_NAMES = ArgumentNames("query", "documents", ("query", "document", "documents"))
_TEI_NAMES = ArgumentNames("query", "texts", ("query", "text", "texts"))
# Fields that belong to `texts`: what to do with documents.
_WITH_TEXTS = {
    "return_text": 'send "return_documents": true',
    "raw_scores": RAW_SCORES,
    "truncation_direction": TRUNCATE.format("a query"),
}
_NOT_CUT = "documents are never cut here; leave it out, and send documents that fit"


class Document(BaseModel):
    """A text to rank; its other fields come back with `return_documents`."""

    model_config = ConfigDict(extra="allow")
    text: Text


class RerankBody(RequestBody):
    """As Cohere, vLLM and Jina take it, or with `texts` as Text Embeddings Inference does."""

    elsewhere: ClassVar[dict[str, str]] = {
        "max_tokens_per_doc": _NOT_CUT,
        "max_chunks_per_doc": _NOT_CUT,
        "truncate_prompt_tokens": TRUNCATE.format("a query"),
        "rank_fields": "a document is ranked by its 'text' alone; leave it out",
        "relevant_spans": "none are looked for here; leave it out",
        "priority": "requests run in the order in which they come; leave it out",
        "max_doc_length": _NOT_CUT,
        "max_query_length": TRUNCATE.format("a query"),
        "truncation": TRUNCATE.format("a query"),
        "activation": RAW_SCORES,
        "use_activation": RAW_SCORES,
    }
    query: Text | Messages = Field(description="expected text, or messages")
    documents: Annotated[list[Text | Document], FAIL_FAST] | None = Field(
        None,
        min_length=1,
        max_length=MOST_ITEMS,
        description="expected a list of at least one text, or objects with a text",
    )
    texts: Texts | None = Field(
        None, min_length=1, max_length=MOST_ITEMS, description="expected a list of at least one text"
    )
    top_n: int | None = Field(None, ge=1, description="how many of the best to return; by default all")
    return_documents: bool = False
    return_text: bool = Field(False, description="with texts: return each text as well")
    raw_scores: bool = Field(False, description="with texts: scores as the model gives them, not between 0 and 1")
    truncation_direction: Literal["Left", "left"] | None = Field(
        None, description="with texts: expected 'Left', because only the beginning of a query is cut"
    )
    model: str | None = Field(None, description="name of this server's model; may be left out")
    instruction: Text | None = Field(None, description=INSTRUCTION)
    aggregation: Aggregation | None = None
    truncate: bool = Field(False, description="leave out the beginning of a query that is too long")


def add(routes: APIRouter, service: Service) -> None:
    """Declare the endpoint."""

    async def rerank(request: Request, body: RerankBody) -> Response:
        """Order documents by how well each answers the query, as the servers of Cohere, vLLM, Jina or TEI do."""
        check_model(service, body.model)
        if (body.documents is None) == (body.texts is None):
            got = "neither" if body.texts is None else "both"
            raise InputError(f"expected documents, or as Text Embeddings Inference takes them texts; got {got}")
        return json_response(await (_answer if body.texts is None else _tei_answer)(service, request, body))

    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        routes.post(path, name="rerank", include_in_schema=path == "/v1/rerank")(rerank)


async def _answer(service: Service, request: Request, body: RerankBody) -> dict[str, object]:
    """Cohere's form of an answer, in which scores are numbers: a document without one is left out, with a warning."""
    assert body.documents is not None
    for name in ("return_text", "raw_scores", "truncation_direction"):
        if getattr(body, name):
            raise InputError(f"{name}: {_WITH_TEXTS[name]}")
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    ranked = ClientRequest(to_runtime(body.query, "query"), texts, _NAMES, body.instruction)
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


async def _tei_answer(service: Service, request: Request, body: RerankBody) -> list[dict[str, object]]:
    """The form of Text Embeddings Inference: a list, the best first; a text without a score is left out."""
    assert body.texts is not None
    for name in ("return_documents", "top_n"):
        if getattr(body, name):
            raise InputError(f"{name}: belongs to documents; leave it out with texts")
    asked = ClientRequest(to_runtime(body.query, "query"), body.texts, _TEI_NAMES, body.instruction)
    outcome, ranking = await service.rank(request, asked, aggregation=body.aggregation, truncate=body.truncate)
    return [
        {"index": i, "score": tei_score(service, outcome.scores[i], raw=body.raw_scores)}
        | ({"text": body.texts[i]} if body.return_text else {})
        for i in ranking.order
        if not math.isnan(outcome.scores[i])
    ]


def _document(document: str | Document) -> dict[str, object]:
    return {"text": document} if isinstance(document, str) else document.model_dump()

"""What the endpoints under `/v1` answer: requests as they were checked in, JSON objects out."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec
import numpy as np
from starlette.requests import Request

from ....errors import InputError
from ...generate.options import GenerateOptions
from ...generate.result import Generation
from ...rank.result import Ranking, winner
from ...results import to_json
from ..errors import as_problem, encode
from ..ranking import Asked, Found, Usage
from ..schemas import BestOfN, Document, Message, Rerank, Score
from ..service import Service
from ..streaming import Growth

__all__ = ["best_of_n_answer", "rerank_answer", "score_answer"]

_SAMPLING = ("n", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "aggregation")
# Of Cohere: what a client counts as one search.
_SEARCH_UNIT = 100


async def rerank_answer(service: Service, request: Request, body: Rerank) -> dict[str, Any]:
    """As Cohere answers, whose scores are numbers: a document that has none is left out, and a warning names it."""
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    asked = Asked(
        _item(body.query, "query"),
        texts,
        "query",
        "documents",
        "documents[{}]".format,
        ("query", "document", "documents"),
    )
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
    return _head(service) | {"results": results, "usage": found.usage.shown(), "meta": meta}


def _document(document: str | Document) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else document.model_dump()


async def score_answer(service: Service, request: Request, body: Score) -> dict[str, Any]:
    """As vLLM answers; a pair that cannot be scored has null."""
    asked = _pairs(body)
    results = await service.rank_all(request, asked, aggregation=body.aggregation, truncate=body.truncate)
    scores = [score for found in results for score in found.scores]
    warnings = [warning for found in results for warning in found.warnings]
    answer = {
        "object": "list",
        "created": int(time.time()),
        "data": [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)],
        "usage": sum((found.usage for found in results), Usage(0)).shown(),
    }
    return _head(service) | answer | _warned(warnings)


def _pairs(body: Score) -> list[Asked]:
    nouns = ("text_1", "text_2", "texts of text_2")
    first = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    names = ["text_2"] if isinstance(body.text_2, str) else [f"text_2[{i}]" for i in range(len(second))]
    if len(first) == 1:
        prompt = "text_1" if isinstance(body.text_1, str) else "text_1[0]"
        return [Asked(first[0], second, prompt, "text_2", names.__getitem__, nouns)]
    if len(first) != len(second):
        raise InputError(f"text_1 has {len(first)} texts and text_2 {len(second)}; expected one, or as many")
    return [
        Asked(prompt, [text], f"text_1[{i}]", "text_2", names[i : i + 1].__getitem__, nouns)
        for i, (prompt, text) in enumerate(zip(first, second, strict=True))
    ]


async def best_of_n_answer(service: Service, request: Request, body: BestOfN) -> dict[str, Any] | AsyncIterator[bytes]:
    """The choice, or the events of a generation that is watched."""
    if (body.candidates is None) == (body.n is None):
        given = "both" if body.n is not None else "neither"
        raise InputError(f"expected candidates to choose from, or n of them to generate; got {given}")
    if body.candidates is not None:
        return await _ranked(service, request, body)
    _check_generation(body)
    options = cast(GenerateOptions, {key: value for key in _SAMPLING if (value := getattr(body, key)) is not None})
    if isinstance(body.stop, str):
        options["stop"] = [body.stop]
    prompt = _item(body.prompt, "prompt")
    if body.stream:
        return _events(await service.watch(request, prompt, options, body.deadline), service, body)
    if body.deadline is not None:
        found = await service.cut(request, prompt, options, body.deadline)
    else:
        found = await service.generate(request, prompt, options)
    return _generated(service, body, found)


def _check_generation(body: BestOfN) -> None:
    """Refuse what belongs to given candidates only."""
    for field in ("answers", "partial", "truncate"):
        if getattr(body, field):
            raise InputError(f"{field}: belongs to given candidates; leave it out to generate")
    if body.vote != "score":
        raise InputError("vote: generated candidates are chosen by score; generate first, then send them with answers")


async def _ranked(service: Service, request: Request, body: BestOfN) -> dict[str, Any]:
    for field in (*_SAMPLING[1:-1], "deadline"):
        if getattr(body, field) is not None:
            raise InputError(f"{field}: belongs to generation; leave it out with candidates")
    if body.stream:
        raise InputError("stream: given candidates are ranked in one step; leave it out")
    if body.vote != "score" and body.answers is None:
        raise InputError(f"vote: '{body.vote}' needs answers: a list with one for each candidate, 'boxed' or 'number'")
    assert body.candidates is not None
    items = [_item(candidate, f"candidates[{i}]") for i, candidate in enumerate(body.candidates)]
    found, ranking = await service.rank(
        request, Asked(_item(body.prompt, "prompt"), items),
        aggregation=body.aggregation, partial=body.partial, truncate=body.truncate,
        vote=body.vote, answers=body.answers,
    )  # fmt: skip
    best = items[ranking.best_index]
    answer = {
        "best_index": ranking.best_index,
        "best": to_json(best),
        "margin": ranking.margin,
        "order": ranking.order,
        "aggregation": ranking.aggregation,
        "vote": body.vote,
        "candidates": [_candidate(found, ranking, body, i) for i in range(len(items))],
        "usage": found.usage.shown(),
    }
    return _head(service) | answer | _warned(found.warnings)


def _head(service: Service) -> dict[str, Any]:
    return {"id": uuid.uuid4().hex, "model": service.engine.manifest.name}


def _warned(warnings: list[str]) -> dict[str, Any]:
    return {"warnings": warnings} if warnings else {}


def _candidate(found: Found, ranking: Ranking, body: BestOfN, i: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"index": i, "score": found.scores[i], "tokens": len(ranking.scores[i])}
    if ranking.answers is not None:
        entry["answer"] = ranking.answers[i]
    if ranking.group_scores is not None:
        entry["group_score"] = to_json(ranking.group_scores[i])
    if ranking.step_scores is not None:
        entry["step_scores"] = to_json(ranking.step_scores[i])
    if body.token_scores:
        entry["token_scores"] = to_json(ranking.scores[i])
    return entry


def _generated(service: Service, body: BestOfN, found: Generation) -> dict[str, Any]:
    """A generation, finished or not."""
    scores = sorted((c.score for c in found.candidates if not np.isnan(c.score)), reverse=True)
    best = found.candidates[found.best_index] if found.best_index >= 0 else None
    candidates = []
    for i, c in enumerate(found.candidates):
        entry: dict[str, Any] = {"index": i, "text": c.text, "score": c.score, "tokens": len(c.tokens)}
        entry["finish_reason"] = c.finish_reason
        if c.text is None:
            entry["token_ids"] = c.tokens.tolist()
        if body.token_scores:
            entry["token_scores"] = to_json(c.scores)
        candidates.append(entry)
    return _head(service) | {
        "best_index": found.best_index,
        "best": None if best is None else best.tokens.tolist() if best.text is None else best.text,
        "margin": scores[0] - scores[1] if len(scores) > 1 else None,
        "aggregation": found.aggregation,
        "candidates": candidates,
        "usage": Usage(found.prompt_tokens, found.computed_tokens).shown(),
    }


async def _events(states: Growth, service: Service, body: BestOfN) -> AsyncIterator[bytes]:
    """`progress` while candidates grow, then `result`, or `error`: all of one answer, under its one id."""
    last, head = None, _head(service)
    try:
        async for state in states:
            if last is not None:
                yield _event("progress", _generated(service, body, last) | head)
            last = state
        assert last is not None
        winner(last.best_index, "candidates")
        yield _event("result", _generated(service, body, last) | head)
    except Exception as e:
        problem = as_problem(e)
        if problem is None:
            raise
        yield _event("error", msgspec.json.decode(problem.response("/v1/").body))


def _event(name: str, value: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + encode(value) + b"\n\n"


def _item(value: Any, name: str) -> Any:
    """What the runtime takes: messages as mappings, embeddings as an array."""
    if isinstance(value, list) and value and isinstance(value[0], Message):
        return [message.model_dump(exclude_unset=True) for message in value]
    if isinstance(value, list) and value and isinstance(value[0], list):
        widths = {len(row) for row in value}
        if len(widths) > 1:
            shown = ", ".join(map(str, sorted(widths)[:5]))
            raise InputError(f"{name}: expected embeddings, rows of one length; got {shown}")
        try:
            with np.errstate(over="raise"):
                return np.array(value, np.float64).astype(np.float32)
        except FloatingPointError as e:
            raise InputError(f"{name}: a number is out of range for float32 embeddings") from e
    return value

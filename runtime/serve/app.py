"""The application: `create_app` makes it, uvicorn or Ray Serve runs it."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import fastapi
import msgspec
import numpy as np
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

import bonnx

from ..errors import ArtifactError, InputError, NoWinnerError
from ..generation import Generation
from ..inputs import Item
from ..model import Model
from ..ranking import Ranking, winner
from .growth import Growth
from .guard import Guard
from .lane import LateError, OverfullError
from .meter import Meter
from .problems import Problem, as_problem, encode, respond
from .protocol import protocol_routes
from .schemas import BestOfN, Message, Rerank, Score, explain
from .service import Service, finite
from .settings import Settings

__all__ = ["create_app"]

_BODIES: dict[str, type[BaseModel]] = {"rerank": Rerank, "score": Score, "best_of_n": BestOfN}
_SAMPLING = ("n", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "aggregation")


def create_app(model: Model, settings: Settings | None = None) -> fastapi.FastAPI:
    """The application that serves a model.

    Args:
        model: an open artifact; all its graphs are loaded now.
        settings: bounds; the defaults if not given.
    """
    settings = settings or Settings()
    meter = Meter(model.manifest.name, model.provider, bonnx.__version__)
    service = Service(model, settings, meter)

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = fastapi.FastAPI(
        title="bonnx", version=bonnx.__version__, description=f"Best-of-N with {model.manifest.name}", lifespan=lifespan
    )
    app.state.service = service
    for kind in (ArtifactError, InputError, NoWinnerError, OverfullError, LateError, Problem):
        app.add_exception_handler(kind, respond)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(HTTPException, _not_here)
    app.include_router(_routes(service))
    app.include_router(protocol_routes(service))
    app.add_middleware(Guard, settings=settings, meter=meter)
    _document(app)
    return app


def _routes(service: Service) -> fastapi.APIRouter:
    routes = fastapi.APIRouter()
    name = service.model.manifest.name

    def check_name(model: str | None) -> None:
        if model is not None and model != name:
            raise Problem(404, f"model: this server has '{name}' only; got {model!r:.80}")

    async def rerank(request: Request, body: Rerank) -> Response:
        """Order documents by how well each answers the query, as Cohere's and vLLM's servers do."""
        check_name(body.model)
        documents = [d if isinstance(d, str) else d.text for d in body.documents]
        options = {"aggregation": body.aggregation, "truncate": body.truncate}
        ranking = await service.rank(request, _item(body.query), documents, **options)
        results: list[dict[str, Any]] = []
        for i in ranking.order[: body.top_n]:
            result: dict[str, Any] = {"index": i, "relevance_score": float(ranking.candidate_scores[i])}
            results.append(result | ({"document": {"text": documents[i]}} if body.return_documents else {}))
        tokens = sum(map(len, ranking.scores))
        return _json({
            "id": uuid.uuid4().hex, "model": name, "results": results, "usage": {"total_tokens": tokens},
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        })  # fmt: skip

    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        routes.post(path, name="rerank", include_in_schema=path == "/v1/rerank")(rerank)

    async def score(request: Request, body: Score) -> Response:
        """Scores of pairs of texts, as vLLM's server gives them."""
        check_name(body.model)
        first, second = ([t] if isinstance(t, str) else t for t in (body.text_1, body.text_2))
        if len(first) == 1:
            pairs: list[tuple[Item, list[Item]]] = [(first[0], [*second])]
        elif len(first) == len(second):
            pairs = [(prompt, [text]) for prompt, text in zip(first, second, strict=True)]
        else:
            raise InputError(f"text_1 has {len(first)} texts and text_2 {len(second)}; expected one, or as many")
        options = {"aggregation": body.aggregation, "truncate": body.truncate}
        rankings = await service.rank_all(request, pairs, **options)
        scores = [float(value) for ranking in rankings for value in ranking.candidate_scores]
        tokens = sum(len(own) for ranking in rankings for own in ranking.scores)
        return _json({
            "id": uuid.uuid4().hex, "object": "list", "created": int(time.time()), "model": name,
            "data": [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        })  # fmt: skip

    for path in ("/v1/score", "/score"):
        routes.post(path, name="score", include_in_schema=path == "/v1/score")(score)

    @routes.post("/v1/best-of-n", name="best_of_n")
    async def best_of_n(request: Request, body: BestOfN) -> Response:
        """Choose the best of given candidates, or of n that are generated now."""
        check_name(body.model)
        if (body.candidates is None) == (body.n is None):
            given = "both" if body.n is not None else "neither"
            raise InputError(f"expected candidates to choose from, or n of them to generate; got {given}")
        if body.candidates is not None:
            return _json(await _ranked(service, request, body))
        _check_generation(body)
        options = {key: value for key in _SAMPLING if (value := getattr(body, key)) is not None}
        prompt = _item(body.prompt)
        if body.stream:
            states = service.watch(request, prompt, options, body.deadline)
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(_events(states, service, body), 200, headers, "text/event-stream")
        if body.deadline is not None:
            found = await service.cut(request, prompt, options, body.deadline)
        else:
            found = await service.generate(request, prompt, options)
        return _json(_generated(service, body, found))

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server answers, and well."""
        service.check_whole()
        return {"status": "ok", "model": name}

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.meter.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


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
    assert body.candidates is not None
    items = [_item(candidate) for candidate in body.candidates]
    ranking = await service.rank(
        request, _item(body.prompt), items,
        aggregation=body.aggregation, partial=body.partial, truncate=body.truncate,
        vote=body.vote, answers=body.answers,
    )  # fmt: skip
    return _choice(service, ranking, body) | {
        "candidates": [_candidate(ranking, body, i) for i in range(len(items))],
        "usage": {"completion_tokens": sum(map(len, ranking.scores)), "cut_tokens": ranking.cut},
    }


def _choice(service: Service, ranking: Ranking, body: BestOfN) -> dict[str, Any]:
    assert body.candidates is not None
    return {
        "id": uuid.uuid4().hex,
        "model": service.model.manifest.name,
        "best_index": ranking.best_index,
        "best": body.candidates[ranking.best_index],
        "margin": ranking.margin,
        "order": ranking.order,
        "aggregation": ranking.aggregation,
        "vote": body.vote,
    }


def _candidate(ranking: Ranking, body: BestOfN, i: int) -> dict[str, Any]:
    found: dict[str, Any] = {"index": i, "score": float(ranking.candidate_scores[i])}
    if ranking.answers is not None:
        found["answer"] = ranking.answers[i]
    if ranking.group_scores is not None:
        found["group_score"] = float(ranking.group_scores[i])
    if ranking.step_scores is not None:
        found["step_scores"] = finite(ranking.step_scores[i])
    if body.token_scores:
        found["token_scores"] = finite(ranking.scores[i])
    return found


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
            entry["token_scores"] = finite(c.scores)
        candidates.append(entry)
    return {
        "id": uuid.uuid4().hex,
        "model": service.model.manifest.name,
        "best_index": found.best_index,
        "best": None if best is None else best.tokens.tolist() if best.text is None else best.text,
        "margin": scores[0] - scores[1] if len(scores) > 1 else None,
        "aggregation": found.aggregation,
        "candidates": candidates,
        "usage": {"prompt_tokens": found.prompt_tokens, "completion_tokens": found.computed_tokens},
    }


async def _events(states: Growth, service: Service, body: BestOfN) -> AsyncIterator[bytes]:
    """`progress` while candidates grow, then `result`, or `error`."""
    last = None
    try:
        async for state in states:
            if last is not None:
                yield _event("progress", _generated(service, body, last))
            last = state
        assert last is not None
        winner(last.best_index, "candidates")
        yield _event("result", _generated(service, body, last))
    except Exception as e:
        problem = as_problem(e)
        if problem is None:
            raise
        yield _event("error", msgspec.json.decode(problem.response("/v1/").body))


def _event(name: str, value: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + encode(value) + b"\n\n"


def _item(value: Any) -> Any:
    """What the runtime takes: messages as mappings, embeddings as an array."""
    if isinstance(value, list) and value and isinstance(value[0], Message):
        return [message.model_dump() for message in value]
    if isinstance(value, list) and value and isinstance(value[0], list):
        widths = {len(row) for row in value}
        if len(widths) > 1:
            raise InputError(f"embeddings: expected rows of one length; got {', '.join(map(str, sorted(widths)[:5]))}")
        return np.array(value, np.float32)
    return value


def _json(value: Any) -> Response:
    return Response(encode(value), media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    """A body that is not as documented."""
    assert isinstance(error, RequestValidationError)
    route = request.scope.get("route")
    body = _BODIES.get(getattr(route, "name", ""))
    return Problem(400, explain([*error.errors()], body)).response(request.url.path)


async def _not_here(request: Request, error: Exception) -> Response:
    """What FastAPI itself answers: no such path, no such method, a body that cannot be read."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    said = {
        404: f"there is no {path[:100]} here; see /openapi.json",
        405: f"{path[:100]} does not take {request.method}",
    }
    message = said.get(error.status_code, str(error.detail))
    return Problem(error.status_code, message, dict(error.headers or {})).response(path)


def _document(app: fastapi.FastAPI) -> None:
    """OpenAPI with the errors as they are: 400 for bad input, in this API's shape."""
    schema = app.openapi()
    problem = {
        "type": "object",
        "properties": {"message": {"type": "string"}, "error": {}},
        "required": ["error"],
    }
    schema.setdefault("components", {}).setdefault("schemas", {})["Problem"] = problem
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    said = {
        "400": "bad input", "401": "no key", "404": "no such model", "408": "the body came too slowly",
        "413": "the body is too large", "422": "every score is NaN", "429": "the queue is full; see Retry-After",
        "503": "too many bodies at once, or the model's files were changed", "504": "the request's time was over",
    }  # fmt: skip
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            responses: dict[str, Any] = operation["responses"]
            responses.pop("422", None)
            for status in said if path.startswith(("/v1", "/v2")) else ("401",):
                responses[status] = {"description": said[status], "content": content}
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    app.openapi_schema = schema

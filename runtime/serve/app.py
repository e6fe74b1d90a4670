"""The application: `create_app` makes it, uvicorn or Ray Serve runs it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

import bonnx

from ...errors import ArtifactError, InputError, NoWinnerError
from ..engine.engine import Engine
from .batcher import LateError, OverfullError
from .errors import Problem, encode, respond
from .json_route import JsonRoute
from .metrics import Meter
from .middleware import Guard
from .routes.best_of_n import best_of_n_answer, rerank_answer, score_answer
from .routes.open_inference import protocol_routes
from .schemas import BestOfN, Rerank, Score, explain
from .service import Service
from .settings import Settings

__all__ = ["create_app"]

_BODIES: dict[str, type[BaseModel]] = {"rerank": Rerank, "score": Score, "best_of_n": BestOfN}


def create_app(engine: Engine, settings: Settings | None = None) -> fastapi.FastAPI:
    """The application that serves a model.

    Args:
        engine: an open artifact; all its graphs are loaded now.
        settings: bounds; the defaults if not given.
    """
    settings = settings or Settings()
    meter = Meter(engine.manifest.name, engine.provider, bonnx.__version__)
    service = Service(engine, settings, meter)

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        # Elsewhere, so that requests whose time is over can give up the runs that this waits for.
        await asyncio.to_thread(service.close)

    # Its pages for people come from here, not from the internet.
    app = FastAPIOffline(
        static_url="/docs/files",
        title="bonnx",
        version=bonnx.__version__,
        description=f"Best-of-N with {engine.manifest.name}",
        lifespan=lifespan,
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
    routes = fastapi.APIRouter(route_class=JsonRoute)
    name = service.engine.manifest.name

    def check_name(model: str | None) -> None:
        if model is not None and model != name:
            raise Problem(404, f"model: this server has '{name}' only; got {model!r:.80}")

    async def rerank(request: Request, body: Rerank) -> Response:
        """Order documents by how well each answers the query, as Cohere's and vLLM's servers do."""
        check_name(body.model)
        return _json(await rerank_answer(service, request, body))

    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        routes.post(path, name="rerank", include_in_schema=path == "/v1/rerank")(rerank)

    async def score(request: Request, body: Score) -> Response:
        """Scores of pairs of texts, as vLLM's server gives them."""
        check_name(body.model)
        return _json(await score_answer(service, request, body))

    for path in ("/v1/score", "/score"):
        routes.post(path, name="score", include_in_schema=path == "/v1/score")(score)

    @routes.post("/v1/best-of-n", name="best_of_n")
    async def best_of_n(request: Request, body: BestOfN) -> Response:
        """Choose the best of given candidates, or of n that are generated now."""
        check_name(body.model)
        answer = await best_of_n_answer(service, request, body)
        if isinstance(answer, dict):
            return _json(answer)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(answer, 200, headers, "text/event-stream")

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
        "413": "the body is too large", "415": "the body is not JSON by its type, or it is compressed",
        "422": "every score is NaN", "429": "the queue is full; see Retry-After",
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

"""The application: `create_app` makes it, uvicorn or Ray Serve runs it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import bonnx
from bonnx.errors import ArtifactError, InputError, NoWinnerError, UpstreamError

from ..engine.engine import Engine
from .batcher import DeadlineError, QueueFullError
from .errors import ApiError, respond
from .metrics import Metrics
from .middleware import RequestMiddleware
from .routes import all_routes
from .schemas import explain
from .service import Service
from .settings import Settings

__all__ = ["create_app"]


def create_app(engine: Engine, settings: Settings | None = None) -> fastapi.FastAPI:
    """The application that serves a model.

    Args:
        engine: an open artifact; all of its graphs are loaded now.
        settings: what the server allows; by default `Settings()`.
    """
    settings = settings or Settings()
    metrics = Metrics(settings.model_name or engine.manifest.name, engine.provider, bonnx.__version__)
    service = Service(engine, settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        # In a thread, so that requests that time out can give up the runs that this waits for.
        await asyncio.to_thread(service.close)
        if service.upstream is not None:
            await service.upstream.aclose()

    # Serves the files of its documentation pages itself, so that they need no internet.
    app = FastAPIOffline(
        static_url="/docs/files",
        title="bonnx",
        version=bonnx.__version__,
        description=f"Best-of-N with {engine.manifest.name}",
        lifespan=lifespan,
    )
    app.state.service = service
    for kind in (ArtifactError, InputError, NoWinnerError, UpstreamError, QueueFullError, DeadlineError, ApiError):
        app.add_exception_handler(kind, respond)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(HTTPException, _not_here)
    app.include_router(all_routes(service))
    app.add_middleware(RequestMiddleware, settings=settings, metrics=metrics)
    if settings.cors_origins:
        # Outermost: a browser asks before it sends the key.
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    _document(app)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    """Explain a body that does not match its schema."""
    assert isinstance(error, RequestValidationError)
    field = getattr(request.scope.get("route"), "body_field", None)
    body: type[BaseModel] | None = None if field is None else field.field_info.annotation
    return ApiError(400, explain(error.errors(), body)).response(request.url.path)


async def _not_here(request: Request, error: Exception) -> Response:
    """Word FastAPI's own errors: no such path, no such method, a body that cannot be read."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    messages = {
        404: f"there is no {path[:100]} here; see /openapi.json",
        405: f"{path[:100]} does not take {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, dict(error.headers or {})).response(path)


def _document(app: fastapi.FastAPI) -> None:
    """OpenAPI with the errors as they are: 400 for bad input, in this API's shape."""
    schema = app.openapi()
    error = {
        "type": "object",
        "properties": {"message": {"type": "string"}, "error": {}},
        "required": ["error"],
    }
    schema.setdefault("components", {}).setdefault("schemas", {})["Error"] = error
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    descriptions = {
        "400": "bad input", "401": "no key", "404": "no such model", "408": "the body came too slowly",
        "413": "the body is too large", "415": "the body is not JSON by its type, or it is compressed",
        "422": "every score is NaN", "429": "the queue is full; see Retry-After",
        "502": "the upstream failed",
        "503": "too many bodies at once, or the model's files were changed", "504": "the request timed out",
    }  # fmt: skip
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            responses: dict[str, object] = operation["responses"]
            responses.pop("422", None)
            for status in descriptions if path.startswith(("/v1", "/v2", "/predict")) else ("401",):
                responses[status] = {"description": descriptions[status], "content": content}
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    app.openapi_schema = schema

"""The ingress: it reads a request, gives it to a replica, and to another one if that dies before it has answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, cast

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import bonnx

from ..batcher import DeadlineError
from ..errors import ApiError
from ..metrics import Metrics
from ..middleware import RequestMiddleware
from ..request_state import LONGEST_TIMEOUT, deadline, unless_gone
from ..settings import Settings
from .forwarded import Forwarded, prompt_key

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

__all__ = ["create_ingress"]

_LOG = logging.getLogger("bonnx.serve")
# What a replica needs of a scope; the rest belongs to this process.
_KEPT = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "client")
# A replica answers itself when the time is over; the ingress waits a little longer for that, in seconds.
_GRACE = 1.0


def create_ingress(model: DeploymentHandle[Any], settings: Settings) -> ASGIApp:
    """The application that forwards every request.

    Args:
        model: the replicas.
        settings: those of the replicas; the key, bodies and origins are checked here already.
    """
    metrics = Metrics(settings.model_name or "", "ray", bonnx.__version__)
    app: ASGIApp = _without_id(RequestMiddleware(_Forwarding(model, settings.timeout), settings, metrics))
    if settings.cors_origins:
        app = CORSMiddleware(app, settings.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return app


def _without_id(app: ASGIApp) -> ASGIApp:
    """Leave out the request's id, which Ray's proxy adds."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def pass_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        await app(scope, receive, pass_on)

    return wrapped


class _Forwarding:
    def __init__(self, model: DeploymentHandle[Any], timeout: float) -> None:
        self._model, self._timeout = model.options(stream=True), timeout
        self._idle = Starlette()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._idle(scope, receive, send)
            return
        body = (await receive())["body"]
        # There is nobody to tell that the client has left.
        with contextlib.suppress(DeadlineError):
            request = Request(scope, receive)
            await unless_gone(request, self._answer(scope, body, deadline(request, self._timeout), send))

    async def _answer(self, scope: Scope, body: bytes, until: float, send: Send) -> None:
        key, begun = prompt_key(body), False
        for attempt in (1, 2):
            try:
                async for message in self._messages(Forwarded(_forwarded(scope, until), body, key), until):
                    begun = True
                    await send(message)
            except RayActorError as e:
                notes = {"event": "replica_died", "attempt": attempt, "error": str(e).strip().splitlines()[0]}
                _LOG.warning("a replica died", extra={"notes": scope["state"]["notes"] | notes})
                if begun:
                    break
            else:
                return
        if not begun:
            raise ApiError(503, "two replicas died while they computed this; try again later", {"Retry-After": "1"})
        # The status has been sent already: a client that reads events gets one more.
        error = ApiError(503, "the replica that computed this has died; send the request again").response(scope["path"])
        await send({"type": "http.response.body", "body": b"event: error\ndata: " + bytes(error.body) + b"\n\n"})

    async def _messages(self, request: Forwarded, until: float) -> AsyncIterator[Message]:
        """The replica's messages.

        Raises:
            ApiError: all replicas are busy, or none has answered in time.
            RayActorError: the replica has died.
        """
        # The handle of a stream returns a generator, which its type does not say.
        responses = cast("DeploymentResponseGenerator[list[Message]]", self._model.answer.remote(request))
        whole = False
        try:
            messages = await asyncio.wait_for(anext(responses), max(0.0, until - time.monotonic()) + _GRACE)
            while True:
                for message in messages:
                    yield message
                # After its last message a client is called disconnected.
                whole = not messages[-1].get("more_body", False)
                if whole:
                    break
                messages = await anext(responses)
        except BackPressureError as e:
            raise ApiError(429, "the queue is full; try again in a second", {"Retry-After": "1"}) from e
        except asyncio.TimeoutError as e:
            raise ApiError(504, "no replica has answered in time; try again, or allow more time") from e
        finally:
            if not whole:
                responses.cancel()  # type: ignore[no-untyped-call]


def _forwarded(scope: Scope, until: float) -> Scope:
    """The scope as a replica gets it, with the time that is left and the id of the request."""
    left = min(max(0.001, until - time.monotonic()), LONGEST_TIMEOUT)
    ours = {b"x-request-timeout": f"{left:.3f}".encode(), b"x-request-id": scope["state"]["request_id"].encode()}
    headers = [(name, value) for name, value in scope["headers"] if name not in ours]
    return {name: scope[name] for name in _KEPT if name in scope} | {"headers": [*headers, *ours.items()]}

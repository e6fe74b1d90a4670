"""What runs before the application: it checks the key and reads the body; each request gets an id and a log line."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics
from .settings import Settings

__all__ = ["RequestMiddleware"]

_LOG = logging.getLogger("bonnx.serve")
# Monitoring needs no key.
_OPEN = {"/health", "/v2/health/live", "/v2/health/ready"}
_REQUEST_ID = re.compile(r"[\w.-]{1,64}")


class RequestMiddleware:
    """ASGI middleware, the outermost.

    A body is read here, whole, before the application sees the request: it is refused by its announced size before a
    byte of it is read, and by its real size as soon as that is too large.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        notes: dict[str, object] = {"request_id": request_id}
        scope.setdefault("state", {}).update(request_id=request_id, notes=notes, started=start)
        status = 499  # nothing was answered: the client disconnected

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        held = 0
        try:
            self._check_key(scope["path"], headers)
            _check_encoding(headers)
            held = self._announced(headers)
            self._buffered += held
            body = await self._read(receive, held)
            scope["state"]["size"] = len(body)
            await self._app(scope, _replay(body, receive), answer)
        except ApiError as problem:
            await problem.response(scope["path"])(scope, receive, answer)
        except _GoneError:
            notes["gone"] = True
        except asyncio.CancelledError:
            # The server was told to stop, and the time to finish in is over.
            if status == 499:
                text = "this server is stopping; send the request again"
                await ApiError(503, text, {"Connection": "close"}).response(scope["path"])(scope, receive, answer)
        except Exception:
            _LOG.exception("failed", extra={"notes": {"event": "failure", **notes}})
            if status == 499:
                text = f"something went wrong here; the server's log has it under {request_id}"
                await ApiError(500, text).response(scope["path"])(scope, receive, answer)
        finally:
            self._buffered -= held
            seconds = time.monotonic() - start
            route = scope.get("route")
            endpoint = getattr(route, "path", None) or ("/v2" if scope["path"].startswith("/v2/") else "other")
            self._metrics.answered(endpoint, status, seconds)
            line = {"event": "request", "method": scope["method"], "path": scope["path"][:200], "status": status}
            _LOG.info("request", extra={"notes": {**line, "seconds": round(seconds, 6), **notes}})

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        key = self._settings.api_key
        if key is None or path in _OPEN:
            return
        if not hmac.compare_digest(headers.get(b"authorization", b""), b"Bearer " + key.encode()):
            raise ApiError(401, "expected the header 'Authorization: Bearer KEY' with this server's key")

    def _announced(self, headers: dict[bytes, bytes]) -> int:
        """The size that the headers announce; the maximum if they announce none."""
        limit = self._settings.max_body
        size = 0 if b"transfer-encoding" not in headers else limit
        if b"content-length" in headers:
            digits = headers[b"content-length"].decode("latin-1")
            if not re.fullmatch(r"[0-9]{1,18}", digits):
                raise ApiError(400, "Content-Length: expected a number of bytes")
            size = int(digits)
        if size > limit:
            raise ApiError(413, f"a body of {size} bytes: this server takes at most {limit}", {"Connection": "close"})
        if self._buffered + size > self._settings.max_buffered:
            raise ApiError(503, "this server holds as many bodies as it may; try again", {"Retry-After": "1"})
        return size

    async def _read(self, receive: Receive, size: int) -> bytes:
        """The whole body, if it comes in time."""
        seconds, parts, total = self._settings.body_timeout, [], 0
        until, more = time.monotonic() + seconds, True
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except asyncio.TimeoutError:
                text = f"the body did not arrive within {seconds:g} s"
                raise ApiError(408, text, {"Connection": "close"}) from None
            if message["type"] == "http.disconnect":
                raise _GoneError
            parts.append(message.get("body", b""))
            total += len(parts[-1])
            if total > max(size, 0):
                text = f"a body of more than {size} bytes: this server takes at most {self._settings.max_body}"
                raise ApiError(413, text, {"Connection": "close"})
            more = message.get("more_body", False)
        return b"".join(parts)


def _check_encoding(headers: dict[bytes, bytes]) -> None:
    """Refuse a compressed body: what it unpacks to is not bounded by its size."""
    encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip()
    if encoding.lower() not in ("", "identity"):
        text = f"Content-Encoding: bodies are read as they come; got {encoding!r:.40}; send it uncompressed"
        raise ApiError(415, text, {"Accept-Encoding": "identity", "Connection": "close"})


class _GoneError(Exception):
    """The client closed the connection before its request was complete."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then further messages, such as that the client disconnects."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
        }
        notes = getattr(record, "notes", None)
        line |= notes if notes is not None else {"event": "log", "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)

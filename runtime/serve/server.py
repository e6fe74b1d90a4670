"""The server process: uvicorn, its log as JSON lines on stderr, and connections that say nothing."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import fastapi
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .guard import JsonFormatter

__all__ = ["log_to_stderr", "make_server"]

_HEADER_SECONDS = 10.0


class _Impatient(HttpToolsProtocol):
    """Closes a connection whose request's headers do not arrive in time; uvicorn itself would wait for ever."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_waiting()

    def data_received(self, data: bytes) -> None:
        if self._waiting is None and (self.cycle is None or self.cycle.response_complete):
            self._start_waiting()
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _start_waiting(self) -> None:
        self._waiting = self.loop.call_later(_HEADER_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


def make_server(
    app: fastapi.FastAPI, host: str, port: int, *, most_connections: int = 1024, grace: int = 30
) -> uvicorn.Server:
    """A server that is ready to `run`.

    Args:
        app: what `create_app` made.
        host: address to listen at.
        port: 0 takes a free one; the log says which.
        most_connections: beyond them the answer is 503.
        grace: seconds in which it finishes what was taken, when it is told to stop.
    """
    options: dict[str, Any] = {
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "limit_concurrency": most_connections,
        "timeout_graceful_shutdown": grace,
        "timeout_keep_alive": 30,
        "ws": "none",
    }
    return uvicorn.Server(uvicorn.Config(app, host=host, port=port, http=_Impatient, **options))


def log_to_stderr() -> None:
    """Everything that the server and uvicorn say, one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("bonnx.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)

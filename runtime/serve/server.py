"""The server process: uvicorn, where it listens, its log as JSON lines on stderr, and silent connections."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import sys

import fastapi
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bonnx.errors import InputError

from .errors import ApiError
from .middleware import JsonFormatter

__all__ = ["bind_to", "log_to_stderr", "make_server"]

_HEADER_SECONDS = 10.0


class _Impatient(HttpToolsProtocol):
    """Closes a connection whose request's headers do not arrive in time; uvicorn would wait forever."""

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

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP as JSON, too."""
        body = bytes(ApiError(400, "expected an HTTP request; this is none").response("/").body)
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _start_waiting(self) -> None:
        self._waiting = self.loop.call_later(_HEADER_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class _Server(uvicorn.Server):
    """Logs where it listens; uvicorn does not if it gets sockets."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            try:
                listener.listen(self.config.backlog)
            except OSError as e:
                # Another program has come first: as long as neither listens, both can be bound to a port.
                raise InputError(_cannot_listen(host, port, e)) from e
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            text = "running on http://%s:%d" if ":" not in host else "running on http://[%s]:%d"
            logging.getLogger("bonnx.serve").info(text, host, port)


def bind_to(host: str, port: int) -> list[socket.socket]:
    """Sockets that are bound to an address: one, or two for a name that is an IPv4 and an IPv6 address.

    Args:
        host: name or address.
        port: 0 takes a free one.

    Raises:
        InputError: the port is in use or may not be taken, or there is no such address on this machine.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port: expected 0 (any free port) to {2**16 - 1}; got {port}")
    try:
        resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as e:
        raise InputError(f"--host: there is no address {host!r}: {e}; 127.0.0.1 is this machine alone") from e
    bound: list[socket.socket] = []
    for family, address in dict.fromkeys((entry[0], entry[4]) for entry in resolved):
        # The same free port for both addresses of a name.
        taken = bound[0].getsockname()[1] if bound else port
        try:
            bound.append(_bind(family, (address[0], taken, *address[2:])))
        except OSError as e:
            if e.errno == errno.EADDRNOTAVAIL and len(resolved) > 1:
                continue
            for listener in bound:
                listener.close()
            raise InputError(_cannot_listen(host, port, e)) from e
    if not bound:
        raise InputError(f"--host: no address of {host!r} is this machine's")
    return bound


def _bind(family: int, address: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            # Else a port that was in use a moment ago could not be taken again.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port: {port} of {host} is in use; choose another, or 0 for a free one"
    if error.errno == errno.EACCES:
        return f"--port: {port} may not be taken by this user; choose one above 1023"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host: {host} is not an address of this machine; 127.0.0.1 is, and 0.0.0.0 stands for all of them"
    return f"cannot listen at {host}, port {port}: {error.strerror}"


def make_server(
    app: fastapi.FastAPI, host: str = "127.0.0.1", port: int = 0, *, most_connections: int = 1024, grace: int = 30
) -> uvicorn.Server:
    """A server that is ready to `run`; give `run` the sockets of `bind_to` if they are bound already.

    Args:
        app: what `create_app` made.
        host: address to listen at without sockets.
        port: 0 takes a free one.
        most_connections: further ones are answered with 503.
        grace: seconds in which it finishes requests when it is stopped.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_Impatient,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=most_connections,
        timeout_graceful_shutdown=grace,
        timeout_keep_alive=30,
    )
    return _Server(config)


def log_to_stderr() -> None:
    """Log everything of the server and uvicorn to stderr, one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("bonnx.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)

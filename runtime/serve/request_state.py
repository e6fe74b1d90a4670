"""What belongs to an HTTP request while it is answered: its size, its log line and its client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import Request

from .batcher import DeadlineError
from .errors import ApiError

__all__ = ["LONGEST_TIMEOUT", "add_up", "deadline", "note", "size", "unless_gone"]

T = TypeVar("T")
# What a client may ask for, in seconds.
LONGEST_TIMEOUT = 3600.0


def note(request: Request, **notes: object) -> None:
    """Add fields to the request's log line."""
    request.scope["state"]["notes"].update(notes)


def add_up(request: Request, **numbers: int) -> None:
    """Add numbers to those in the request's log line: a request may take several runs."""
    notes = request.scope["state"]["notes"]
    note(request, **{name: notes.get(name, 0) + number for name, number in numbers.items()})


def size(request: Request) -> int:
    """Bytes of the request's body."""
    size: int = request.scope["state"]["size"]
    return size


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for work, and cancel it when the client disconnects.

    Raises:
        DeadlineError: the client has disconnected.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            note(request, gone=True)
            raise DeadlineError
        return task.result()
    finally:
        for other in (task, leaving):
            if not other.done():
                other.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def deadline(request: Request, seconds: float) -> float:
    """When a request must be answered, on the clock of `time.monotonic`.

    Args:
        request: its header `X-Request-Timeout` may ask for less time.
        seconds: what the server allows.

    Raises:
        ApiError: the header is no number of seconds.
    """
    header = request.headers.get("x-request-timeout")
    if header is not None:
        try:
            timeout = float(header)
        except ValueError:
            timeout = 0.0
        if not 0 < timeout <= LONGEST_TIMEOUT:
            raise ApiError(400, f"X-Request-Timeout: expected seconds above 0; got {header!r:.40}")
        seconds = min(seconds, timeout)
    started: float = request.scope["state"]["started"]
    return started + seconds

"""What belongs to an HTTP request while it is answered: its size, its log line and its client."""

from __future__ import annotations

from starlette.requests import Request

__all__ = ["add_up", "disconnected", "note", "size"]


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


async def disconnected(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

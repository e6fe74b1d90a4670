"""The open connections to a server: those of each event loop, closed with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

import httpx

__all__ = ["Connections"]


class _OfLoop(NamedTuple):
    """Of one event loop: neither a connection nor a semaphore can be used by two."""

    client: httpx.AsyncClient
    open_requests: asyncio.Semaphore
    until_closed: AsyncGenerator[None, None]


class Connections:
    """Safe to share between threads and event loops.

    Args:
        make: makes a client.
        concurrency: maximum number of requests that are open at once in an event loop.
    """

    def __init__(self, make: Callable[[], httpx.AsyncClient], concurrency: int) -> None:
        self._make, self._concurrency = make, concurrency
        self._loops: dict[asyncio.AbstractEventLoop, _OfLoop] = {}

    async def open(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """The client of the running event loop, and what limits its open requests."""
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            # A loop that was closed without closing its asynchronous generators leaves nothing that could be closed.
            for other in [other for other in [*self._loops] if other.is_closed()]:
                self._loops.pop(other, None)
            client = self._make()
            until_closed = self._until_closed(loop, client)
            self._loops[loop] = _OfLoop(client, asyncio.Semaphore(self._concurrency), until_closed)
            await until_closed.__anext__()
        return self._loops[loop][:2]

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        here = self._loops.get(asyncio.get_running_loop())
        if here is not None:
            await here.until_closed.aclose()

    async def _until_closed(
        self, loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient
    ) -> AsyncGenerator[None, None]:
        """Closes the client when it is itself closed: by `aclose`, or by the loop, which does so at its end."""
        try:
            yield
        finally:
            self._loops.pop(loop, None)
            await client.aclose()

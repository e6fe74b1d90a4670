"""A replica: one model with its own limits and queues, which answers what the ingress gives it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ray import serve
from starlette.types import Message

from ...engine.engine import open_engine
from ...engine.session import Provider
from ..app import create_app
from ..server import log_to_stderr
from ..settings import Settings
from .forwarded import Forwarded

__all__ = ["Replica"]


class Replica:
    """The deployment of Ray Serve that holds the model.

    Args:
        artifact: its folder.
        settings: limits of this replica.
        provider: see `bonnx.load`.
        threads: of one run.
        memory_limit: see `bonnx.load`.
        cache_dir: see `bonnx.load`.
    """

    async def __init__(  # type: ignore[misc]
        self,
        artifact: str,
        settings: Settings,
        provider: Provider,
        threads: int,
        memory_limit: int | None,
        cache_dir: str | None,
    ) -> None:
        # Ray adds stderr to the replica's log.
        log_to_stderr()
        engine = open_engine(
            artifact,
            provider=provider,
            threads=threads,
            memory_limit=memory_limit,
            cache_dir=cache_dir,
            prompt_cache=settings.prompt_cache,
        )
        self._app = create_app(engine, settings)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()
        self._running = self._app.router.lifespan_context(self._app)
        await self._running.__aenter__()

    async def __del__(self) -> None:
        await self._running.__aexit__(None, None, None)

    async def answer(self, request: Forwarded) -> AsyncIterator[list[Message]]:
        """The application's messages of ASGI, the first two together; if the iteration ends early, the client has left.

        What is sent costs Ray some time each: most answers are two messages.

        Args:
            request: what was asked.
        """
        # One message at a time: what a slow client has not read is not computed ahead.
        sent: asyncio.Queue[Message | None] = asyncio.Queue(1)
        asked, left = False, asyncio.Event()

        async def receive() -> Message:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": request.body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-replica", self._name)]
            if not left.is_set():
                await sent.put(message)

        async def run() -> None:
            try:
                await self._app(dict(request.scope), receive, send)
            finally:
                if not left.is_set():
                    await sent.put(None)

        running = asyncio.ensure_future(run())
        try:
            together = []
            while (message := await sent.get()) is not None:
                together.append(message)
                if message["type"] != "http.response.start":
                    yield together
                    together = []
            await running
        finally:
            left.set()
            while not sent.empty():
                # A `put` that waits here would wait for ever.
                sent.get_nowait()

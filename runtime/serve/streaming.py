"""A generation that runs in its own thread and is streamed while it grows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor

from ..generate.result import Generation

__all__ = ["GenerationStream"]


class GenerationStream:
    """Begins at once. Each step of an iteration gives the newest state; the result comes last.

    A slow reader misses states and does not delay the generation. To end it early, close the iteration or call `stop`.

    Args:
        states: yields the states of the generation.
        executor: runs the generation.
        done: called in the event loop when the generation has ended.
    """

    def __init__(self, states: Iterator[Generation], executor: Executor, done: Callable[[], None]) -> None:
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._newest: Generation | None = None
        self._error: Exception | None = None
        self._ended = self._stopped = False
        future = self._loop.run_in_executor(executor, self._grow, states)
        future.add_done_callback(lambda _: done())

    def stop(self) -> None:
        """End the generation after the token that is being computed."""
        self._stopped = True

    async def result(self, on_state: Callable[[Generation], object] | None = None) -> Generation:
        """The last state; `on_state` is called with each one.

        Raises:
            Exception: the exception that the generation raised.
        """
        last: Generation | None = None
        async for state in self:
            last = state
            if on_state is not None:
                on_state(state)
        assert last is not None
        return last

    async def __aiter__(self) -> AsyncIterator[Generation]:
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                ended, newest = self._ended, self._newest
                self._newest = None
                if newest is not None:
                    yield newest
                if ended:
                    if self._error is not None:
                        raise self._error
                    return
        finally:
            self.stop()

    def _grow(self, states: Iterator[Generation]) -> None:
        try:
            for state in states:
                if self._stopped:
                    break
                self._newest = state
                self._tell()
        except Exception as e:
            self._error = e
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:
            # The loop is closed: the client has gone.
            self._stopped = True

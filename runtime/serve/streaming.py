"""A generation that is streamed while it grows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from ..generate.growing import Growing
from ..generate.result import Generation
from .generator import Generator, Ticket

__all__ = ["GenerationStream"]


class GenerationStream:
    """Each step of an iteration gives the newest state; the result comes last.

    A slow reader misses states and does not delay the generation. To end it early, close the iteration or call `stop`.

    Args:
        generator: runs the generation.
        ticket: of the generation.
        read: makes the candidates with their texts.
    """

    def __init__(self, generator: Generator, ticket: Ticket, read: Callable[[Growing], Awaitable[Generation]]) -> None:
        self._generator, self._ticket, self._read = generator, ticket, read

    def stop(self) -> None:
        """End the generation after the token that is being computed."""
        self._generator.give_up(self._ticket)

    async def result(self, on_state: Callable[[Generation], object] | None = None) -> Generation:
        """The last state; `on_state` is called with each one.

        Raises:
            Exception: the generation failed.
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
            async for growing in self._ticket.states():
                yield await self._read(growing)
        finally:
            self.stop()

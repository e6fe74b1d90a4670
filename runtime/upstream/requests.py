"""As many requests as it takes to sample some completions of one prompt."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING

from .completion import Completion, Failure
from .cost import SamplingCost
from .events import CompletionChoice

if TYPE_CHECKING:
    from .client import Upstream

__all__ = ["RequestError", "Requests"]

_LONGEST_PAUSE = 30.0
# Seconds to wait for the usage, which follows the last completion.
_USAGE_WAIT = 1.0


class RequestError(Exception):
    """A request that failed.

    Attributes:
        reason: what went wrong, without the key.
        status: of the answer, if there was one.
        final: whether trying again cannot help.
        pause: seconds after which to try again, if the server says so.
    """

    def __init__(
        self, reason: str, *, status: int | None = None, final: bool = False, pause: float | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.status, self.final, self.pause = reason, status, final, pause


class Requests:
    """The requests for completions of one prompt.

    Args:
        upstream: sends them.
        body: of each request, but for the number of completions.
        until: deadline on the clock of `time.monotonic`.
        cost: what to add the cost to.
        on_piece: as in `Upstream.sample`.
    """

    def __init__(
        self,
        upstream: Upstream,
        body: dict[str, object],
        until: float | None,
        cost: SamplingCost,
        on_piece: Callable[[CompletionChoice], object] | None = None,
    ) -> None:
        self._upstream, self._body, self._until, self._cost = upstream, body, until, cost
        self._on_piece = on_piece
        self._arrived: asyncio.Queue[Completion | Failure | None] = asyncio.Queue()

    async def run(self, numbers: Sequence[int]) -> AsyncGenerator[Completion | Failure, None]:
        """A completion or a failure for each number, as they come."""
        work = asyncio.ensure_future(self._request(numbers))
        work.add_done_callback(lambda _: self._arrived.put_nowait(None))
        try:
            left = len(numbers)
            while left and (arrival := await self._arrived.get()) is not None:
                left -= 1
                yield arrival
            await asyncio.wait({work}, timeout=_USAGE_WAIT)
            if work.done() and (error := work.exception()) is not None:
                raise error
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _request(self, numbers: Sequence[int]) -> bool:
        """Ask for all in one request, if the server makes several, and again for those that are missing.

        Returns:
            whether any completion came.
        """
        asked = len(numbers)
        if asked > 1 and self._upstream.makes_several is False:
            return await self._singly(numbers)
        for attempt in range(self._upstream.settings.retries + 1):
            ended, error = await self._attempt(numbers)
            numbers = numbers[ended:]
            if not numbers:
                if asked > 1:
                    self._upstream.makes_several = True
                return True
            if error is None:
                break
            if error.status in (400, 422) and len(numbers) > 1 and self._upstream.makes_several is None:
                # Perhaps `n` is what it refuses. One request tells; a bad one is not sent once for each completion.
                if not await self._request(numbers[:1]):
                    self._fail(numbers[1:], error.reason, error.status)
                    return len(numbers) < asked
                self._upstream.makes_several = False
                await self._singly(numbers[1:])
                return True
            pause = min(0.5 * 2**attempt, 8.0) * random.uniform(0.75, 1.25) if error.pause is None else error.pause
            is_late = self._until is not None and time.monotonic() + pause > self._until
            if error.final or is_late or pause > _LONGEST_PAUSE or attempt == self._upstream.settings.retries:
                self._fail(numbers, error.reason, error.status)
                return len(numbers) < asked
            await asyncio.sleep(pause)
        if asked == 1:
            self._fail(numbers, "the upstream answered without a completion")
            return False
        return await self._singly(numbers)

    async def _singly(self, numbers: Sequence[int]) -> bool:
        """Ask for completions one by one; whether any came."""
        came = any(await asyncio.gather(*(self._request([number]) for number in numbers)))
        if came and self._upstream.makes_several is None:
            self._upstream.makes_several = False
        return came

    async def _attempt(self, numbers: Sequence[int]) -> tuple[int, RequestError | None]:
        """Send one request: how many completions ended, and what went wrong."""
        body = self._body
        if len(numbers) > 1:
            body = {**body, "n": len(numbers)}
        if isinstance(seed := body.get("seed"), int):
            body = {**body, "seed": seed + numbers[0]}
        ended, begun = 0, False

        def take(piece: CompletionChoice) -> None:
            nonlocal begun
            begun = True
            assert self._on_piece is not None
            self._on_piece(piece)

        async def read() -> None:
            nonlocal ended
            async for completion in self._upstream.send(body, self._cost, take if self._on_piece else None):
                # Some servers make more than they are asked for.
                if ended < len(numbers):
                    ended += 1
                    self._arrived.put_nowait(completion)

        try:
            await asyncio.wait_for(read(), None if self._until is None else max(0.0, self._until - time.monotonic()))
        except asyncio.TimeoutError:
            return ended, RequestError("the deadline passed before the upstream was done", final=True)
        except RequestError as e:
            e.final = e.final or begun
            return ended, e
        return ended, None

    def _fail(self, numbers: Sequence[int], reason: str, status: int | None = None) -> None:
        for _ in numbers:
            self._arrived.put_nowait(Failure(reason, status))

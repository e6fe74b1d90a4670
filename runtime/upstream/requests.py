"""As many requests as it takes to sample some completions of one prompt."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING

from ..seeds import seed_after
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
        """Ask for all in one request, if the server makes as many at once, and again for those that are missing.

        Returns:
            whether any completion came.
        """
        upstream, asked = self._upstream, len(numbers)
        if upstream.at_most is not None and asked > upstream.at_most:
            return await self._in_pieces(numbers, upstream.at_most)
        for attempt in range(upstream.settings.retries + 1):
            came, error = await self._attempt(numbers)
            numbers = [number for number in numbers if number not in came]
            if not numbers:
                upstream.makes_at_once = max(len(came), upstream.makes_at_once or 0)
                return True
            if error is None:
                return await self._ask_for_missing(numbers, len(came), asked)
            if error.status in (400, 422) and len(numbers) > max(1, upstream.makes_at_once or 0):
                return await self._ask_for_fewer(numbers, error) or len(numbers) < asked
            pause = min(0.5 * 2**attempt, 8.0) * random.uniform(0.75, 1.25) if error.pause is None else error.pause
            is_late = self._until is not None and time.monotonic() + pause > self._until
            if error.final or is_late or pause > _LONGEST_PAUSE or attempt == upstream.settings.retries:
                self._fail(numbers, error.reason, error.status)
                return len(numbers) < asked
            await asyncio.sleep(pause)
            runs = _runs(numbers)
            if len(runs) > 1 and self._has_seed:
                # The seeds of one request follow each other, and those of the completions that came are used.
                return any(await asyncio.gather(*map(self._request, runs))) or len(numbers) < asked
        raise AssertionError("unreachable")

    async def _ask_for_missing(self, numbers: Sequence[int], made: int, asked: int) -> bool:
        """The server answered with fewer completions than it was asked for."""
        if asked == 1:
            self._fail(numbers, "the upstream answered without a completion")
            return False
        upstream = self._upstream
        if made and upstream.makes_at_once in (None, made):
            # It ignores `n`, or makes no more at once.
            upstream.makes_at_once = upstream.at_most = made
        return await self._in_pieces(numbers, upstream.at_most or 1) or made > 0

    async def _ask_for_fewer(self, numbers: Sequence[int], error: RequestError) -> bool:
        """Perhaps `n` is what the server refused: one request with an `n` that it honours tells.

        A bad request is not sent once for each completion.
        """
        few = self._upstream.makes_at_once or 1
        if not await self._request(numbers[:few]):
            self._fail(numbers[few:], error.reason, error.status)
            return False
        self._upstream.at_most = few
        await self._in_pieces(numbers[few:], few)
        return True

    async def _in_pieces(self, numbers: Sequence[int], size: int) -> bool:
        """Ask for a few completions at a time; whether any came."""
        pieces = [numbers[first : first + size] for first in range(0, len(numbers), size)]
        return any(await asyncio.gather(*map(self._request, pieces)))

    async def _attempt(self, numbers: Sequence[int]) -> tuple[set[int], RequestError | None]:
        """Send one request: the numbers of the completions that ended, and what went wrong."""
        body = self._body
        if len(numbers) > 1:
            body = {**body, "n": len(numbers)}
        if self._has_seed:
            body = {**body, "seed": seed_after(body["seed"], numbers[0])}  # type: ignore[arg-type]
        missing, begun = [*numbers], False

        def take(piece: CompletionChoice) -> None:
            nonlocal begun
            begun = True
            assert self._on_piece is not None
            self._on_piece(piece)

        async def read() -> None:
            async for index, completion in self._upstream.send(body, self._cost, take if self._on_piece else None):
                # Some servers make more than they are asked for.
                if missing:
                    number = numbers[index] if 0 <= index < len(numbers) else missing[0]
                    missing.remove(number if number in missing else missing[0])
                    self._arrived.put_nowait(completion)

        error = None
        try:
            await asyncio.wait_for(read(), None if self._until is None else max(0.0, self._until - time.monotonic()))
        except asyncio.TimeoutError:
            error = RequestError("the deadline passed before the upstream was done", final=True)
        except RequestError as e:
            error = e
            error.final = error.final or begun
        return {*numbers} - {*missing}, error

    @property
    def _has_seed(self) -> bool:
        seed = self._body.get("seed")
        return isinstance(seed, int) and not isinstance(seed, bool)

    def _fail(self, numbers: Sequence[int], reason: str, status: int | None = None) -> None:
        for _ in numbers:
            self._arrived.put_nowait(Failure(reason, status))


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Numbers in runs that follow each other without a gap."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs

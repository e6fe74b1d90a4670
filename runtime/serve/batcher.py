"""A lane in front of a model: works wait in it, and those that are alike run together, in a thread of its own.

While one run is under way others arrive, so batches form by themselves as the load grows. After a run the lane waits a
little for those who were just answered: clients that send one request after another would else fall into two halves,
each waiting for the other's run. A single client never waits.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..batching import Batchable, Shape, batch_size, padded_tokens, plan
from ..engine.session import Stop

__all__ = ["Lane", "LateError", "OverfullError", "Watcher"]


_LOG = logging.getLogger("bonnx.serve")
# What a lane may wait for those who were just answered, as a share of the run that answered them.
_LULL = 0.1


class OverfullError(Exception):
    """So many works wait already.

    Attributes:
        retry_after: seconds after which there will be room, as far as one can tell.
    """

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests wait already; try again in {retry_after} s")
        self.retry_after = retry_after


class LateError(Exception):
    """The request's time was over before its answer was there."""


class Watcher(Protocol):
    """Is told what a lane does."""

    def waiting(self, lane: str, count: int) -> None: ...

    def ran(self, lane: str, works: int, real: int, padded: int, seconds: float) -> None: ...


@dataclass(eq=False)
class _Ticket:
    """A work that waits or runs, and who waits for it."""

    work: Batchable
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    arrived: float
    given_up: bool = False
    """The client is gone or its time is over: nobody reads the result."""

    def finish(self, result: Any) -> None:
        """Hand over a result or an error, from any thread."""

        def deliver() -> None:
            if not self.future.done():
                if isinstance(result, BaseException):
                    self.future.set_exception(result)
                else:
                    self.future.set_result(result)

        try:
            self.loop.call_soon_threadsafe(deliver)
        except RuntimeError:
            # The loop is closed: the server was told to stop at once, and nobody waits any more.
            self.given_up = True


class Lane:
    """Runs works one joint run after another.

    Args:
        name: for the watcher.
        run: runs works of equal keys together; for each a result or an error.
        fits: see `plan`.
        stop: makes what `run` can be stopped with.
        watcher: is told what happens.
        most_waiting: works that may wait.
        patience: seconds that the oldest may wait for company whatever is likely to come.
        waste: see `plan`.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[Any], Stop], Sequence[Any]],
        fits: Callable[[int, Shape], bool],
        stop: Callable[[], Stop],
        watcher: Watcher,
        *,
        most_waiting: int,
        patience: float,
        waste: float,
    ) -> None:
        self.name, self._run, self._fits, self._stop, self._watcher = name, run, fits, stop, watcher
        self._most, self._patience, self._waste = most_waiting, patience, waste
        self._waiting: list[_Ticket] = []
        self._running: tuple[list[_Ticket], Stop] | None = None
        self._ready = threading.Condition()
        self._closing = False
        self._expected, self._lull = 1, 0.0
        self._pace = 0.01  # seconds for each work, a running mean
        self._thread = threading.Thread(target=self._serve, name=f"bonnx-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish what was taken, then end the thread."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        self._thread.join()

    async def put(self, works: Sequence[Batchable], until: float) -> list[Any]:
        """The results of works, all or none of them taken.

        Args:
            works: what to run, at least one.
            until: on the clock of `time.monotonic`.

        Raises:
            OverfullError: too many wait.
            LateError: the time is over.
            Exception: what the first that failed raised.
        """
        loop, now = asyncio.get_running_loop(), time.monotonic()
        tickets = [_Ticket(work, loop.create_future(), loop, now) for work in works]
        with self._ready:
            if len(self._waiting) + len(works) > self._most:
                raise OverfullError(len(self._waiting), max(1, math.ceil(self._pace * len(self._waiting))))
            self._waiting += tickets
            self._watcher.waiting(self.name, len(self._waiting))
            self._ready.notify()
        try:
            futures = [ticket.future for ticket in tickets]
            done, late = await asyncio.wait(
                futures, timeout=max(0.0, until - time.monotonic()), return_when=asyncio.FIRST_EXCEPTION
            )
            for future in done:
                future.result()
            if late:
                raise LateError
            return [future.result() for future in futures]
        finally:
            for ticket in tickets:
                if not ticket.future.done():
                    self._give_up(ticket)

    def _give_up(self, ticket: _Ticket) -> None:
        """Nobody reads this one; a run that nobody reads ends at its next operator."""
        ticket.future.cancel()
        with self._ready:
            ticket.given_up = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._watcher.waiting(self.name, len(self._waiting))
            if self._running is not None and all(other.given_up for other in self._running[0]):
                self._running[1].terminate = True

    def _serve(self) -> None:
        going = True
        while going:
            try:
                going = self._serve_once()
            except Exception as e:
                # Whatever is wrong here, a lane that no longer runs would let everybody wait for ever.
                _LOG.exception("a lane failed", extra={"notes": {"event": "failure", "lane": self.name}})
                with self._ready:
                    waiting, self._waiting, self._running = self._waiting, [], None
                for ticket in waiting:
                    ticket.finish(e)

    def _serve_once(self) -> bool:
        """One run; False when there will be none any more."""
        with self._ready:
            while not self._waiting:
                if self._closing:
                    return False
                self._ready.wait()
            self._wait_for_company()
            waiting = list(self._waiting)
        tickets = self._choose(waiting) if waiting else []
        with self._ready:
            self._waiting = [ticket for ticket in self._waiting if ticket not in tickets]
            self._watcher.waiting(self.name, len(self._waiting))
        self._work(tickets)
        with self._ready:
            # Whoever was just answered may well ask again.
            self._expected = len(tickets) + len(self._waiting)
        return True

    def _wait_for_company(self) -> None:
        """Wait, the lock held, until all that are likely to come are there, or waited long enough, or a run is full."""
        start = time.monotonic()
        while self._waiting and not self._closing:
            until = self._waiting[0].arrived + self._patience
            if len(self._waiting) < self._expected:
                until = max(until, start + self._lull)
            left = until - time.monotonic()
            shapes = [ticket.work.shape for ticket in self._waiting]
            if left <= 0 or not self._fits(len(shapes) + 1, max(shapes, key=lambda shape: padded_tokens(1, shape))):
                return
            self._ready.wait(left)

    def _choose(self, waiting: list[_Ticket]) -> list[_Ticket]:
        """Those that run together with the oldest."""
        groups = plan([ticket.work for ticket in waiting], self._fits, self._waste)
        return [waiting[i] for i in groups[0]]

    def _work(self, tickets: list[_Ticket]) -> None:
        """Run those that somebody still waits for, together; each by itself if that fails."""
        with self._ready:
            tickets = [ticket for ticket in tickets if not ticket.given_up]
            if not tickets:
                return
            stop = self._stop()
            self._running = (tickets, stop)
        start, error = time.monotonic(), None
        results: Sequence[Any] = ()
        try:
            results = self._run([ticket.work for ticket in tickets], stop)
        except Exception as e:
            error = e
        with self._ready:
            self._running = None
        if error is not None and len(tickets) > 1 and not stop.terminate:
            # What one of them did must not fail the others.
            for ticket in tickets:
                self._work([ticket])
            return
        seconds = time.monotonic() - start
        self._lull = _LULL * seconds
        self._pace += 0.1 * (seconds / len(tickets) - self._pace)
        for ticket, result in zip(tickets, results if error is None else [error] * len(tickets), strict=True):
            ticket.finish(result)
        self._watcher.ran(self.name, len(tickets), *batch_size([ticket.work for ticket in tickets]), seconds)

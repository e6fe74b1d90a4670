"""A queue in front of a model: similar requests run together, in a thread of the queue.

While one run is under way, other requests arrive, so batches form by themselves as the load grows. After a run the
batcher waits briefly for the clients that were just answered: without this pause, clients that send one request after
another would split into two halves, each waiting for the other's run. A single client never waits.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..batching import Batchable, Shape, batch_size, company, padded_tokens
from ..engine.session import Stop

__all__ = ["Batcher", "DeadlineError", "Observer", "QueueFullError"]


_LOG = logging.getLogger("bonnx.serve")
# The time that a batcher may wait for the clients that were just answered, as a share of the run that answered them.
_LULL = 0.1


class QueueFullError(Exception):
    """The queue has no room for the request.

    Attributes:
        retry_after: estimated seconds until there is room.
    """

    def __init__(self, waiting: int, seconds: float) -> None:
        self.retry_after = max(1, math.ceil(seconds))
        super().__init__(f"{waiting} requests are waiting; try again in {self.retry_after} s")


class DeadlineError(asyncio.TimeoutError):
    """The request timed out before its answer was ready."""


class Observer(Protocol):
    """Receives a batcher's measurements; `Metrics` is one."""

    def waiting(self, batcher: str, count: int) -> None: ...

    def ran(self, batcher: str, works: int, real: int, padded: int, seconds: float) -> None: ...


@dataclass(eq=False)
class _Pending:
    """A request that waits or runs, and the future that its client awaits."""

    request: Batchable
    future: asyncio.Future[object]
    loop: asyncio.AbstractEventLoop
    arrived: float
    given_up: bool = False
    """The client has disconnected or the request timed out: the result is not needed."""

    def finish(self, result: object) -> None:
        """Deliver a result or an error, from any thread."""

        def deliver() -> None:
            if not self.future.done():
                if isinstance(result, BaseException):
                    self.future.set_exception(result)
                else:
                    self.future.set_result(result)

        try:
            self.loop.call_soon_threadsafe(deliver)
        except RuntimeError:
            # The loop is closed: the server was stopped, and no client waits.
            self.given_up = True


class Batcher:
    """Runs similar requests together, one batch after another.

    Args:
        name: passed to the observer.
        run: runs requests of equal keys together, and returns a result or an error for each.
        fits: see `company`.
        cost: see `company`.
        stop: makes the handle that stops a run.
        observer: receives the measurements.
        max_waiting: maximum number of waiting requests.
        patience: seconds that the oldest request may wait for others at any load.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[Sequence[Batchable], Stop], Sequence[object]],
        fits: Callable[[int, Shape], bool],
        cost: Callable[[int, Shape], float],
        stop: Callable[[], Stop],
        observer: Observer,
        *,
        max_waiting: int,
        patience: float,
    ) -> None:
        self.name, self._run, self._fits, self._cost, self._stop, self._observer = name, run, fits, cost, stop, observer
        self._max_waiting, self._patience = max_waiting, patience
        self._waiting: list[_Pending] = []
        self._running: tuple[list[_Pending], Stop] | None = None
        self._ready = threading.Condition()
        self._closing = False
        self._expected, self._lull = 1, 0.0
        self._pace = 0.01  # seconds for each work, a running mean
        self._thread = threading.Thread(target=self._serve, name=f"bonnx-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish the queued requests, then end the thread."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        self._thread.join()

    async def put(self, requests: Sequence[Batchable], until: float) -> list[object]:
        """Queue all requests or none, and return their results.

        Args:
            requests: the requests, at least one.
            until: the deadline, on the clock of `time.monotonic`.

        Raises:
            QueueFullError: too many requests are waiting.
            DeadlineError: the deadline passed.
            Exception: the error of the first request that failed.
        """
        loop, now = asyncio.get_running_loop(), time.monotonic()
        entries = [_Pending(request, loop.create_future(), loop, now) for request in requests]
        with self._ready:
            if len(self._waiting) + len(requests) > self._max_waiting:
                raise QueueFullError(len(self._waiting), self._pace * len(self._waiting))
            self._waiting += entries
            self._observer.waiting(self.name, len(self._waiting))
            self._ready.notify()
        try:
            futures = [entry.future for entry in entries]
            done, late = await asyncio.wait(
                futures, timeout=max(0.0, until - time.monotonic()), return_when=asyncio.FIRST_EXCEPTION
            )
            for future in done:
                future.result()
            if late:
                raise DeadlineError
            return [future.result() for future in futures]
        finally:
            for entry in entries:
                if not entry.future.done():
                    self._give_up(entry)

    def _give_up(self, entry: _Pending) -> None:
        """Drop a request whose result is not needed; a run without any other request ends at its next operator."""
        entry.future.cancel()
        with self._ready:
            entry.given_up = True
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._observer.waiting(self.name, len(self._waiting))
            if self._running is not None and all(other.given_up for other in self._running[0]):
                self._running[1].terminate = True

    def _serve(self) -> None:
        going = True
        while going:
            try:
                going = self._serve_once()
            except Exception as e:
                # A batcher that stopped would leave every client waiting, so it continues after any failure.
                _LOG.exception("a batcher failed", extra={"notes": {"event": "failure", "batcher": self.name}})
                with self._ready:
                    waiting, self._waiting, self._running = self._waiting, [], None
                for entry in waiting:
                    entry.finish(e)

    def _serve_once(self) -> bool:
        """Run one batch; False once the batcher is closed."""
        with self._ready:
            while not self._waiting:
                if self._closing:
                    return False
                self._ready.wait()
            self._wait_for_more()
            waiting = list(self._waiting)
        entries = self._choose(waiting) if waiting else []
        with self._ready:
            self._waiting = [entry for entry in self._waiting if entry not in entries]
            self._observer.waiting(self.name, len(self._waiting))
        self._run_together(entries)
        with self._ready:
            # Clients that were just answered are likely to ask again.
            self._expected = len(entries) + len(self._waiting)
        return True

    def _wait_for_more(self) -> None:
        """Wait, holding the lock, until the expected requests have come, the time is up, or a batch is full."""
        start = time.monotonic()
        while self._waiting and not self._closing:
            until = self._waiting[0].arrived + self._patience
            if len(self._waiting) < self._expected:
                until = max(until, start + self._lull)
            left = until - time.monotonic()
            shapes = [entry.request.shape for entry in self._waiting]
            if left <= 0 or not self._fits(len(shapes) + 1, max(shapes, key=lambda shape: padded_tokens(1, shape))):
                return
            self._ready.wait(left)

    def _choose(self, waiting: list[_Pending]) -> list[_Pending]:
        """The requests that run together with the oldest."""
        return [waiting[i] for i in company([entry.request for entry in waiting], self._fits, self._cost)]

    def _run_together(self, entries: list[_Pending]) -> None:
        """Run the requests that are still awaited together, or one by one if that fails."""
        with self._ready:
            entries = [entry for entry in entries if not entry.given_up]
            if not entries:
                return
            stop = self._stop()
            self._running = (entries, stop)
        start, error = time.monotonic(), None
        results: Sequence[object] = ()
        try:
            results = self._run([entry.request for entry in entries], stop)
        except Exception as e:
            error = e
        with self._ready:
            self._running = None
        if error is not None and len(entries) > 1 and not stop.terminate:
            # One bad request must not fail the others.
            for entry in entries:
                self._run_together([entry])
            return
        seconds = time.monotonic() - start
        self._lull = _LULL * seconds
        self._pace += 0.1 * (seconds / len(entries) - self._pace)
        for entry, result in zip(entries, results if error is None else [error] * len(entries), strict=True):
            entry.finish(result)
        self._observer.ran(self.name, len(entries), *batch_size([entry.request for entry in entries]), seconds)

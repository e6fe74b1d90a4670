"""A model behind lanes: what the endpoints ask of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from ...errors import ArtifactError, InputError, NoWinnerError
from ..batching import Shape
from ..engine.engine import Engine
from ..engine.session import Stop
from ..generate import run as generation
from ..generate.decoding import clock
from ..generate.options import GenerateOptions
from ..generate.request import GenerateRequest
from ..generate.request import read_request as read_generate_request
from ..generate.result import Generation
from ..rank import run as ranking
from ..rank.request import RankRequest
from ..rank.request import read_request as read_rank_request
from ..rank.result import Ranking, winner
from ..text.reader import Item, NoneReadableError
from .batcher import Lane, LateError, OverfullError
from .errors import Problem
from .limits import check_size, check_texts
from .metrics import Meter
from .ranking import Asked, Found
from .settings import Settings
from .streaming import Growth

__all__ = ["Call", "Service", "size"]

T = TypeVar("T")
_LONGEST_TIMEOUT = 3600.0
# What is read or written in less time than it takes to hand them to another thread.
_SHORT = 4000


class Call:
    """A run of a graph as it stands, by itself.

    Attributes:
        run: takes what can end it.
        shape: how large it is.
    """

    key = None
    prompt_slot = 0

    def __init__(self, run: Callable[[Stop], Any], shape: Shape) -> None:
        self.run, self.shape, self.tokens = run, shape, shape.candidates * shape.length


class Service:
    """Answers requests with one model. Everything that it offers is loaded when it is made."""

    def __init__(self, engine: Engine, settings: Settings, meter: Meter) -> None:
        self.engine, self.settings, self.meter = engine, settings, meter
        for name in engine.manifest.graphs:
            # Loaded now: a file that is replaced while the server runs changes nothing.
            engine.session(name)
        self.generates = "generate" in engine.manifest.graphs
        options: dict[str, Any] = {
            "stop": engine.session("rank").make_stop,
            "watcher": meter,
            "most_waiting": settings.max_queue,
            "patience": settings.batch_wait,
            "waste": settings.batch_waste,
        }
        self._ranking = Lane("rank", self._run, ranking.fits(engine, settings.batch_tokens), **options)
        within = ranking.fits(engine, settings.max_tokens)
        # A step of a generation costs by its candidates, not by the tokens that they may come to have.
        rows = lambda columns, shape: columns * shape.candidates <= settings.batch_candidates and within(columns, shape)  # noqa: E731
        # It lasts: rankings do not stand behind it.
        self._generating = Lane("generate", self._run, rows, **options)
        self._readers = ThreadPoolExecutor(2, "bonnx-read")
        self._streamers = ThreadPoolExecutor(settings.max_streams, "bonnx-stream")
        self._streams = 0
        self.broken = False

    def close(self) -> None:
        """Finish what was taken."""
        self._ranking.close()
        self._generating.close()
        self._readers.shutdown()
        self._streamers.shutdown()

    def check_whole(self) -> None:
        """Raise the error that every request gets once the artifact's files were changed.

        Raises:
            ArtifactError: they were.
        """
        if self.broken:
            raise ArtifactError("the artifact was changed")

    def until(self, request: Request) -> float:
        """When the request's time is over, on the clock of `time.monotonic`.

        Raises:
            Problem: the header that says so is invalid.
        """
        seconds, given = self.settings.timeout, request.headers.get("x-request-timeout")
        if given is not None:
            try:
                asked = float(given)
            except ValueError:
                asked = 0.0
            if not 0 < asked <= _LONGEST_TIMEOUT:
                raise Problem(400, f"X-Request-Timeout: expected seconds above 0; got {given!r:.40}")
            seconds = min(seconds, asked)
        started: float = request.scope["state"]["started"]
        return started + seconds

    async def rank(self, request: Request, asked: Asked, **options: Any) -> tuple[Found, Ranking]:
        """One ranking.

        Raises:
            NoWinnerError: no candidate can win.
            InputError: none can be read, or something else is wrong; in the client's words.
        """
        (found,) = await self.rank_all(request, [asked], **options)
        assert found.ranking is not None
        return found, found.ranking

    async def rank_all(self, request: Request, asked: Sequence[Asked], **options: Any) -> list[Found]:
        """Several rankings; of those that have no winner the first is raised only if no other has one."""
        if len(asked) > self.settings.max_queue:
            raise InputError(f"{len(asked)} pairs: this server takes at most {self.settings.max_queue} at once")
        check_texts(asked, self.engine, self.settings, truncate=bool(options.get("truncate")))
        until = self.until(request)
        # Every candidate is read together with its prompt.
        total = size(request) + sum(one.characters for one in asked)
        jobs = await self.aside(lambda: [self._job(one, options) for one in asked], request, total)
        runs = [job for job in jobs if isinstance(job, RankRequest)]
        if not runs:
            raise next(job for job in jobs if isinstance(job, InputError))
        note(request, rankings=len(runs), tokens=sum(job.shape.prompt + job.tokens for job in runs))
        for one, job in zip(asked, jobs, strict=True):
            if isinstance(job, RankRequest):
                check_size(job.shape, self.settings, one)
        results = iter(await self._unless_gone(request, self._ranking.put(runs, until)))
        found, lost = [], None
        for one, job in zip(asked, jobs, strict=True):
            if isinstance(job, NoneReadableError):
                found.append(Found.lost(one, job.reasons))
                continue
            result = next(results)
            if isinstance(result, _Lost):
                lost = lost or result
                found.append(Found.lost(one, dict.fromkeys(range(len(one.candidates)), "its score is NaN"), job))
            else:
                found.append(Found.ranked(one, job, result))
        if lost is not None and all(one.ranking is None for one in found):
            raise lost.error
        return found

    def _job(self, asked: Asked, options: dict[str, Any]) -> RankRequest | NoneReadableError:
        """What is to run, or that nothing of it can be read."""
        try:
            return read_rank_request(self.engine, asked.prompt, asked.candidates, **options)
        except NoneReadableError as e:
            e.args = (asked.said(str(e)),)
            return e
        except InputError as e:
            raise InputError(asked.said(str(e))) from e

    async def generate(self, request: Request, prompt: Item, options: GenerateOptions) -> Generation:
        """One generation, in one run of one graph."""
        found: Generation
        draft = await self._draft(request, prompt, options)
        note(request, candidates=draft.options.n, tokens=len(draft.prompt))
        (found,) = await self._unless_gone(request, self._generating.put([draft], self.until(request)))
        winner(found.best_index, "candidates")
        return found

    async def _draft(self, request: Request, prompt: Item, options: GenerateOptions) -> GenerateRequest:
        """What is to be generated, read and checked."""
        if not self.generates:
            raise InputError("n: this model has no language model to generate with; pass candidates")
        asked = Asked(prompt, ())
        check_texts([asked], self.engine, self.settings, truncate=False)
        try:
            draft = await self.aside(
                lambda: read_generate_request(self.engine, prompt, options), request, size(request)
            )
        except InputError as e:
            raise InputError(asked.said(str(e))) from e
        check_size(draft.shape, self.settings, asked)
        return draft

    async def aside(self, work: Callable[[], T], request: Request, size: int) -> T:
        """Do a piece of work: at once, or if it is long in another thread, so that others are not held up.

        Args:
            work: reads what a request brought, or writes its answer.
            request: whose work it is; it has the request's time.
            size: characters, tokens or bytes that the work goes through, at the most.
        """
        if size <= _SHORT:
            return work()
        return await self._elsewhere(work, request)

    async def _elsewhere(self, work: Callable[[], T], request: Request) -> T:
        waiting = asyncio.get_running_loop().run_in_executor(self._readers, work)
        try:
            return await self._unless_gone(request, asyncio.wait_for(waiting, self.until(request) - time.monotonic()))
        except asyncio.TimeoutError:
            raise LateError from None

    async def call(self, request: Request, graph: str, run: Callable[[Stop], Any], shape: Shape) -> Any:
        """One run of a graph, by its name."""
        check_size(shape, self.settings)
        note(request, tokens=shape.prompt + shape.candidates * shape.length)
        lane = self._generating if graph == "generate" else self._ranking
        (found,) = await self._unless_gone(request, lane.put([Call(run, shape)], self.until(request)))
        return found

    async def watch(self, request: Request, prompt: Item, options: GenerateOptions, deadline: float | None) -> Growth:
        """A generation while it grows, cut at its deadline or when the request's time is over.

        Raises:
            OverfullError: as many are watched as may be.
            InputError: an option or the prompt is invalid.
        """
        if self._streams >= self.settings.max_streams:
            raise OverfullError(self._streams, 1)
        self._streams += 1
        try:
            draft = await self._draft(request, prompt, options)
            left = max(0.001, self.until(request) - time.monotonic())
            states = generation.stream(self.engine, draft, clock(min(left, deadline or left)))
            return Growth(states, self._streamers, self._release)
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        self._streams -= 1

    async def cut(self, request: Request, prompt: Item, options: GenerateOptions, deadline: float) -> Generation:
        """One generation, cut at its deadline."""
        states = await self.watch(request, prompt, options, deadline)
        found: Generation = await self._unless_gone(request, states.result())
        winner(found.best_index, "candidates")
        return found

    async def _unless_gone(self, request: Request, work: Awaitable[T]) -> T:
        """Wait for work, and give it up when the client goes."""
        task = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                note(request, gone=True)
                raise LateError
            return task.result()
        finally:
            for other in (task, leaving):
                if not other.done():
                    other.cancel()
            await asyncio.gather(task, leaving, return_exceptions=True)

    def _run(self, works: Sequence[Any], stop: Stop) -> Sequence[Any]:
        """What a lane runs: works of one kind."""
        try:
            if isinstance(works[0], Call):
                return [work.run(stop) for work in works]
            if isinstance(works[0], GenerateRequest):
                return generation.run_together(self.engine, works, stop)
            found = ranking.run_together(self.engine, works, stop)
            # Not an error of the lane: others of the same request may have a winner.
            return [_Lost(one) if isinstance(one, NoWinnerError) else one for one in found]
        except ArtifactError:
            # Its files were changed: from now on the server says so.
            self.broken = True
            raise


@dataclass(frozen=True)
class _Lost:
    """A ranking that has no winner."""

    error: NoWinnerError


def note(request: Request, **notes: Any) -> None:
    """Put more into the request's line of log."""
    request.scope["state"]["notes"].update(notes)


def size(request: Request) -> int:
    """Bytes of the request's body."""
    found: int = request.scope["state"]["size"]
    return found


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

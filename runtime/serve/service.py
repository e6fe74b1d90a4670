"""A model behind lanes: what the endpoints ask of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request

from ..drafts import Draft
from ..errors import ArtifactError, InputError
from ..generation import Generation
from ..inputs import Item
from ..jobs import Shape, padded_tokens
from ..model import Model
from ..ranking import Ranking, winner
from ..session import Stop
from .growth import Growth
from .lane import Lane, LateError, OverfullError
from .meter import Meter
from .problems import Problem
from .settings import Settings

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
    column = 0

    def __init__(self, run: Callable[[Stop], Any], shape: Shape) -> None:
        self.run, self.shape, self.tokens = run, shape, shape.candidates * shape.length


class Service:
    """Answers requests with one model. Everything that it offers is loaded when it is made."""

    def __init__(self, model: Model, settings: Settings, meter: Meter) -> None:
        self.model, self.settings, self.meter = model, settings, meter
        for name in model.manifest.graphs:
            # Loaded now: a file that is replaced while the server runs changes nothing.
            model.session(name)
        self.generates = "generate" in model.manifest.graphs
        options: dict[str, Any] = {
            "stop": model.session("rank").make_stop,
            "watcher": meter,
            "most_waiting": settings.max_queue,
            "patience": settings.batch_wait,
            "waste": settings.batch_waste,
        }
        self._ranking = Lane("rank", self._run, model.fits(settings.batch_tokens), **options)
        within = model.fits(settings.max_tokens)
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
            Problem: the header that says so has no meaning.
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

    async def rank(self, request: Request, prompt: Item, candidates: Sequence[Item], **options: Any) -> Ranking:
        """One ranking."""
        (found,) = await self.rank_all(request, [(prompt, candidates)], **options)
        return found

    async def rank_all(
        self, request: Request, pairs: Sequence[tuple[Item, Sequence[Item]]], **options: Any
    ) -> list[Ranking]:
        """Several rankings; the first that fails is raised."""
        limit = self.model.manifest.limits.max_candidates
        for prompt, candidates in pairs:
            if len(candidates) > limit:
                raise InputError(f"{len(candidates)} candidates: this model takes at most {limit} at once; split them")
            self._check_lengths(prompt, candidates)
        if len(pairs) > self.settings.max_queue:
            raise InputError(f"{len(pairs)} pairs: this server takes at most {self.settings.max_queue} at once")
        until = self.until(request)
        read = lambda: [self.model.job(prompt, candidates, **options) for prompt, candidates in pairs]  # noqa: E731
        # Every candidate is read together with its prompt.
        times = max(len(candidates) for _, candidates in pairs)
        jobs = await self.aside(read, request, times * size(request))
        note(request, rankings=len(jobs), tokens=sum(job.shape.prompt + job.tokens for job in jobs))
        for job in jobs:
            self._check_size(job.shape)
        found: list[Ranking] = await self._unless_gone(request, self._ranking.put(jobs, until))
        return found

    async def generate(self, request: Request, prompt: Item, options: dict[str, Any]) -> Generation:
        """One generation, in one run of one graph."""
        found: Generation
        self._check_generates()
        self._check_lengths(prompt, ())
        until = self.until(request)
        draft = await self.aside(lambda: self.model.draft(prompt, **options), request, size(request))
        self._check_size(draft.shape)
        note(request, candidates=draft.request.n, tokens=len(draft.prompt))
        (found,) = await self._unless_gone(request, self._generating.put([draft], until))
        winner(found.best_index, "candidates")
        return found

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
        self._check_size(shape)
        note(request, tokens=shape.prompt + shape.candidates * shape.length)
        lane = self._generating if graph == "generate" else self._ranking
        (found,) = await self._unless_gone(request, lane.put([Call(run, shape)], self.until(request)))
        return found

    def watch(self, request: Request, prompt: Item, options: dict[str, Any], deadline: float | None) -> Growth:
        """A generation while it grows, cut at its deadline or when the request's time is over.

        Raises:
            OverfullError: as many are watched as may be.
            InputError: an option or the prompt has no meaning.
        """
        self._check_generates()
        self._check_lengths(prompt, ())
        if self._streams >= self.settings.max_streams:
            raise OverfullError(self._streams, 1)
        left = self.until(request) - time.monotonic()
        if left <= 0:
            raise LateError
        self._check_size(self.model.draft(prompt, **options).shape)
        states = self.model.stream(prompt, deadline=min(left, deadline or left), **options)
        self._streams += 1
        return Growth(states, self._streamers, self._release)

    def _release(self) -> None:
        self._streams -= 1

    async def cut(self, request: Request, prompt: Item, options: dict[str, Any], deadline: float) -> Generation:
        """One generation, cut at its deadline."""
        found: Generation = await self._unless_gone(request, self.watch(request, prompt, options, deadline).result())
        winner(found.best_index, "candidates")
        return found

    def _check_generates(self) -> None:
        if not self.generates:
            raise InputError("n: this model has no language model to generate with; pass candidates")

    def _check_lengths(self, prompt: Item, candidates: Sequence[Item]) -> None:
        """Refuse texts that cannot fit, before they are tokenized."""
        most = self.model.reader.most_characters
        if most is None:
            return
        for what, item in (("prompt", prompt), *((f"candidates[{i}]", item) for i, item in enumerate(candidates))):
            if isinstance(item, str) and len(item) > most:
                limit = self.model.manifest.limits.max_tokens
                raise InputError(f"{what}: {len(item)} characters are more than {limit} tokens can hold; shorten it")

    def _check_size(self, shape: Shape) -> None:
        tokens, most = padded_tokens(1, shape), self.settings.max_tokens
        if tokens > most:
            raise InputError(
                f"{shape.candidates} candidates of {shape.length} tokens after {shape.prompt} of the prompt are "
                f"{tokens} tokens, padding included: this server takes at most {most} at once; ask for less"
            )

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
            if isinstance(works[0], Draft):
                return self.model.generate_together(works, stop)
            return self.model.run_together(works, stop)
        except ArtifactError:
            # Its files were changed: from now on the server says so.
            self.broken = True
            raise


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


def finite(scores: np.ndarray[Any, Any]) -> list[float]:
    """Scores as JSON has them; its encoder writes null for NaN."""
    return [float(score) for score in scores]

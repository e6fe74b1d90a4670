"""A model behind batchers: what the endpoints ask for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from bonnx.errors import ArtifactError, InputError, NoWinnerError

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
from .batcher import Batcher, DeadlineError, QueueFullError
from .errors import ApiError
from .limits import check_size, check_texts
from .metrics import Metrics
from .ranking import ClientRequest, Outcome
from .settings import Settings
from .streaming import GenerationStream

__all__ = ["GraphRequest", "Service", "size"]

T = TypeVar("T")
_LONGEST_TIMEOUT = 3600.0
# So little is read or written faster here than handed to another thread.
_SHORT = 4000


class GraphRequest:
    """A run of one graph on tensors that the client filled.

    Attributes:
        run: runs it; takes the handle that stops it.
        shape: its size.
    """

    key = None
    prompt_slot = 0

    def __init__(self, run: Callable[[Stop], Any], shape: Shape) -> None:
        self.run, self.shape, self.tokens = run, shape, shape.candidates * shape.length


class Service:
    """Answers requests with one model; every graph is loaded at the start."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        for name in engine.manifest.graphs:
            # Loaded now: a file that is replaced while the server runs changes nothing.
            engine.session(name)
        self.generates = "generate" in engine.manifest.graphs
        options: dict[str, Any] = {
            "stop": engine.session("rank").make_stop,
            "observer": metrics,
            "max_waiting": settings.max_queue,
            "patience": settings.batch_wait,
            "waste": settings.batch_waste,
        }
        self._ranking = Batcher("rank", self._run, ranking.fits(engine, settings.batch_tokens), **options)
        within = ranking.fits(engine, settings.max_tokens)
        # A step of a generation costs by its candidates, not by the tokens that they may come to have.
        rows = lambda columns, shape: columns * shape.candidates <= settings.batch_candidates and within(columns, shape)  # noqa: E731
        # A queue of its own, so that rankings need not wait for long generations.
        self._generating = Batcher("generate", self._run, rows, **options)
        self._readers = ThreadPoolExecutor(2, "bonnx-read")
        self._streamers = ThreadPoolExecutor(settings.max_streams, "bonnx-stream")
        self._streams = 0
        self.broken = False

    def close(self) -> None:
        """Finish the queued requests."""
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
        """The request's deadline, on the clock of `time.monotonic`.

        Raises:
            ApiError: the header that says so is invalid.
        """
        seconds, given = self.settings.timeout, request.headers.get("x-request-timeout")
        if given is not None:
            try:
                asked = float(given)
            except ValueError:
                asked = 0.0
            if not 0 < asked <= _LONGEST_TIMEOUT:
                raise ApiError(400, f"X-Request-Timeout: expected seconds above 0; got {given!r:.40}")
            seconds = min(seconds, asked)
        started: float = request.scope["state"]["started"]
        return started + seconds

    async def rank(self, request: Request, asked: ClientRequest, **options: Any) -> tuple[Outcome, Ranking]:
        """One ranking.

        Raises:
            NoWinnerError: no candidate can win.
            InputError: none can be read, or something else is wrong.
        """
        (found,) = await self.rank_all(request, [asked], **options)
        assert found.ranking is not None
        return found, found.ranking

    async def rank_all(self, request: Request, asked: Sequence[ClientRequest], **options: Any) -> list[Outcome]:
        """Several rankings; of those that have no winner the first is raised only if no other has one."""
        if len(asked) > self.settings.max_queue:
            raise InputError(f"{len(asked)} pairs: this server takes at most {self.settings.max_queue} at once")
        check_texts(asked, self.engine, self.settings, truncate=bool(options.get("truncate")))
        until = self.until(request)
        # Every candidate is read together with its prompt.
        total = size(request) + sum(one.characters for one in asked)
        requests = await self.aside(lambda: [self._read_ranking(one, options) for one in asked], request, total)
        runs = [rank_request for rank_request in requests if isinstance(rank_request, RankRequest)]
        if not runs:
            raise next(rank_request for rank_request in requests if isinstance(rank_request, InputError))
        note(
            request,
            rankings=len(runs),
            tokens=sum(rank_request.shape.prompt + rank_request.tokens for rank_request in runs),
        )
        for one, rank_request in zip(asked, requests, strict=True):
            if isinstance(rank_request, RankRequest):
                check_size(rank_request.shape, self.settings, one.names)
        results = iter(await self._unless_gone(request, self._ranking.put(runs, until)))
        found, lost = [], None
        for one, rank_request in zip(asked, requests, strict=True):
            if isinstance(rank_request, NoneReadableError):
                found.append(Outcome.lost(one, rank_request.reasons))
                continue
            result = next(results)
            if isinstance(result, _Lost):
                lost = lost or result
                found.append(
                    Outcome.lost(one, dict.fromkeys(range(len(one.candidates)), "its score is NaN"), rank_request)
                )
            else:
                found.append(Outcome.ranked(one, rank_request, result))
        if lost is not None and all(one.ranking is None for one in found):
            raise lost.error
        return found

    def _read_ranking(self, asked: ClientRequest, options: dict[str, Any]) -> RankRequest | NoneReadableError:
        """Read what is to be ranked; an error is returned if no candidate can be read."""
        try:
            return read_rank_request(self.engine, asked.prompt, asked.candidates, **options, names=asked.names)
        except NoneReadableError as e:
            return e

    async def generate(self, request: Request, prompt: Item, options: GenerateOptions) -> Generation:
        """One generation, in one run of one graph."""
        found: Generation
        generate_request = await self._read_generation(request, prompt, options)
        note(request, candidates=generate_request.options.n, tokens=len(generate_request.prompt))
        (found,) = await self._unless_gone(request, self._generating.put([generate_request], self.until(request)))
        winner(found.best_index, "candidates")
        return found

    async def _read_generation(self, request: Request, prompt: Item, options: GenerateOptions) -> GenerateRequest:
        """Read and check what is to be generated."""
        if not self.generates:
            raise InputError("n: this model has no language model to generate with; pass candidates")
        check_texts([ClientRequest(prompt, ())], self.engine, self.settings, truncate=False)
        generate_request = await self.aside(
            lambda: read_generate_request(self.engine, prompt, options), request, size(request)
        )
        check_size(generate_request.shape, self.settings)
        return generate_request

    async def aside(self, work: Callable[[], T], request: Request, size: int) -> T:
        """Do a piece of work: at once, or in another thread if it is long, so that it does not delay others.

        Args:
            work: reads a request, or writes an answer.
            request: whose time limit applies.
            size: maximum number of characters, tokens or bytes that the work processes.
        """
        if size <= _SHORT:
            return work()
        return await self._elsewhere(work, request)

    async def _elsewhere(self, work: Callable[[], T], request: Request) -> T:
        waiting = asyncio.get_running_loop().run_in_executor(self._readers, work)
        try:
            return await self._unless_gone(request, asyncio.wait_for(waiting, self.until(request) - time.monotonic()))
        except asyncio.TimeoutError:
            raise DeadlineError from None

    async def call(self, request: Request, graph: str, run: Callable[[Stop], Any], shape: Shape) -> Any:
        """One run of a graph, by its name."""
        check_size(shape, self.settings)
        note(request, tokens=shape.prompt + shape.candidates * shape.length)
        batcher = self._generating if graph == "generate" else self._ranking
        (found,) = await self._unless_gone(request, batcher.put([GraphRequest(run, shape)], self.until(request)))
        return found

    async def watch(
        self, request: Request, prompt: Item, options: GenerateOptions, deadline: float | None
    ) -> GenerationStream:
        """Stream a generation; it is cut at its deadline or when the request times out.

        Raises:
            QueueFullError: the maximum number of streams is open.
            InputError: an option or the prompt is invalid.
        """
        if self._streams >= self.settings.max_streams:
            raise QueueFullError(self._streams, 1)
        self._streams += 1
        try:
            generate_request = await self._read_generation(request, prompt, options)
            left = max(0.001, self.until(request) - time.monotonic())
            states = generation.stream(self.engine, generate_request, clock(min(left, deadline or left)))
            return GenerationStream(states, self._streamers, self._release)
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
        """Wait for work, and cancel it when the client disconnects."""
        task = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                note(request, gone=True)
                raise DeadlineError
            return task.result()
        finally:
            for other in (task, leaving):
                if not other.done():
                    other.cancel()
            await asyncio.gather(task, leaving, return_exceptions=True)

    def _run(self, requests: Sequence[Any], stop: Stop) -> Sequence[Any]:
        """Run a batch of requests of one kind."""
        try:
            if isinstance(requests[0], GraphRequest):
                return [one.run(stop) for one in requests]
            if isinstance(requests[0], GenerateRequest):
                return generation.run_together(self.engine, requests, stop)
            found = ranking.run_together(self.engine, requests, stop)
            # Not an error of the batch: other rankings of the same HTTP request may have a winner.
            return [_Lost(one) if isinstance(one, NoWinnerError) else one for one in found]
        except ArtifactError:
            # The artifact was changed on disk: every answer says so from now on.
            self.broken = True
            raise


@dataclass(frozen=True)
class _Lost:
    """A ranking that has no winner."""

    error: NoWinnerError


def note(request: Request, **notes: Any) -> None:
    """Add fields to the request's log line."""
    request.scope["state"]["notes"].update(notes)


def size(request: Request) -> int:
    """Bytes of the request's body."""
    found: int = request.scope["state"]["size"]
    return found


async def _left(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

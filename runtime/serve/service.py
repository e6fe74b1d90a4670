"""A model behind batchers: everything that the endpoints call."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from starlette.requests import Request

from bonnx.errors import ArtifactError, InputError, NoWinnerError

from ..arrays import Array
from ..batching import Batchable, Shape
from ..engine.engine import Engine
from ..engine.prompt_cache import PREFILL, RANK_CACHED
from ..engine.session import Stop
from ..generate import run as generation
from ..generate.decoding import clock
from ..generate.growing import Growing
from ..generate.options import GenerateOptions
from ..generate.request import GenerateRequest
from ..generate.request import read_request as read_generate_request
from ..generate.result import Generation
from ..generate.rows import can_join
from ..rank import run as ranking
from ..rank.request import RankOptions, RankRequest
from ..rank.request import read_request as read_rank_request
from ..rank.result import Ranking, winner
from ..text.reader import Item, NoneReadableError
from ..upstream.settings import UpstreamSettings
from .batcher import Batcher, DeadlineError, QueueFullError
from .generator import Generator, is_brief
from .limits import check_size, check_texts
from .metrics import Metrics
from .ranking import ClientRequest, Outcome
from .request_state import add_up, deadline, size, unless_gone
from .settings import Settings
from .streaming import GenerationStream
from .tensors import GraphRequest

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..upstream.client import Upstream

__all__ = ["Service"]

T = TypeVar("T")
# Up to this many characters, tokens or bytes are processed faster here than in another thread.
_SHORT = 4000


class Service:
    """Answers requests with one model; every graph is loaded at the start."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.name, self.started = settings.model_name or engine.manifest.name, int(time.time())
        if settings.upstream is not None:
            engine.check_scorer("an upstream's completions: choosing among them")
        self.upstream = None if settings.upstream is None else _open(settings.upstream)
        for name in engine.manifest.graphs:
            # Loaded now: a file that is replaced while the server runs changes nothing.
            if settings.prompt_cache or name not in (PREFILL, RANK_CACHED):
                engine.session(name)
        self.generates = "generate" in engine.manifest.graphs
        self._make_stop = engine.session("rank" if engine.manifest.has_scorer else "generate").make_stop
        self._ranking = self._batcher("rank", ranking.fits(engine, settings.batch_tokens), ranking.cost(engine))
        within = ranking.fits(engine, settings.max_tokens)

        def few_candidates(slots: int, shape: Shape) -> bool:
            # Each token of a generation costs by the candidates, not by the tokens that they may come to have.
            return slots * shape.candidates <= settings.batch_candidates and within(slots, shape)

        # A queue of its own, so that rankings need not wait for generations.
        self._generating = self._batcher("generate", few_candidates, generation.cost(engine))
        self._readers = ThreadPoolExecutor(2, "bonnx-read")
        self._searchers = ThreadPoolExecutor(settings.max_searches, "bonnx-search")
        self._searches = 0
        self.broken = False
        self._generator = None
        # An artifact of an earlier version ranks as before.
        if self.generates and can_join(engine.session("decode")):
            self._generator = Generator(
                engine,
                metrics,
                max_waiting=settings.max_queue,
                max_rows=settings.batch_candidates,
                max_bytes=settings.generation_memory,
                guard=self._noting_changes,
            )

    def _batcher(self, name: str, fits: Callable[[int, Shape], bool], cost: Callable[[int, Shape], float]) -> Batcher:
        return Batcher(
            name,
            self._run,
            fits,
            cost,
            self._make_stop,
            self.metrics,
            max_waiting=self.settings.max_queue,
            patience=self.settings.batch_wait,
        )

    def close(self) -> None:
        """Finish the queued requests."""
        self._ranking.close()
        self._generating.close()
        if self._generator is not None:
            self._generator.close()
        self._readers.shutdown()
        self._searchers.shutdown()

    def check_intact(self) -> None:
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
        return deadline(request, self.settings.timeout)

    async def rank(
        self, request: Request, ranked: ClientRequest, **options: Unpack[RankOptions]
    ) -> tuple[Outcome, Ranking]:
        """One ranking.

        Raises:
            NoWinnerError: no candidate can win.
            InputError: no candidate can be read, or something else is wrong.
        """
        (outcome,) = await self.rank_all(request, [ranked], **options)
        assert outcome.ranking is not None
        return outcome, outcome.ranking

    async def rank_all(
        self, request: Request, ranked: Sequence[ClientRequest], **options: Unpack[RankOptions]
    ) -> list[Outcome]:
        """Several rankings; of those without a winner the first is raised only if no other has one."""
        if len(ranked) > self.settings.max_queue:
            raise InputError(f"{len(ranked)} pairs: this server takes at most {self.settings.max_queue} at once")
        check_texts(ranked, self.engine, self.settings, truncate=options.get("truncate", False))
        until = self.until(request)
        # Every candidate is read together with its prompt.
        total = size(request) + sum(each.characters for each in ranked)
        read = await self.aside(lambda: [self._read_ranking(each, options) for each in ranked], request, total)
        readable = [each for each in read if isinstance(each, RankRequest)]
        if not readable:
            raise next(each for each in read if isinstance(each, InputError))
        add_up(request, rankings=len(readable), tokens=sum(each.sent_tokens for each in readable))
        for client_request, rank_request in zip(ranked, read, strict=True):
            if isinstance(rank_request, RankRequest):
                check_size(rank_request.sent, self.settings, client_request.names)
        results = iter(await unless_gone(request, self._ranking.put(readable, until)))
        outcomes: list[Outcome] = []
        errors: list[NoWinnerError] = []
        for client_request, rank_request in zip(ranked, read, strict=True):
            if isinstance(rank_request, NoneReadableError):
                outcomes.append(Outcome.lost(client_request, rank_request.reasons))
                continue
            result = next(results)
            if isinstance(result, _Lost):
                errors.append(result.error)
                reasons = dict.fromkeys(range(len(client_request.candidates)), "its score is NaN")
                outcomes.append(Outcome.lost(client_request, reasons, rank_request))
            else:
                assert isinstance(result, Ranking)
                outcomes.append(Outcome.ranked(client_request, rank_request, result))
        if errors and all(outcome.ranking is None for outcome in outcomes):
            raise errors[0]
        return outcomes

    def _read_ranking(self, ranked: ClientRequest, options: RankOptions) -> RankRequest | NoneReadableError:
        """Read what is to be ranked; an error is returned if no candidate can be read."""
        try:
            options = {"instruction": ranked.instruction, **options}
            return read_rank_request(
                self.engine, ranked.prompt, ranked.candidates, **options, names=ranked.names, share=True
            )
        except NoneReadableError as e:
            return e

    async def generate(self, request: Request, prompt: Item, options: GenerateOptions) -> Generation:
        """One generation, whole."""
        generate_request = await self.read_generation(request, prompt, options)
        add_up(request, candidates=generate_request.options.n, tokens=len(generate_request.prompt))
        assert self._generator is not None
        if is_brief(self.engine.manifest, generate_request):
            queued = self._generating.put([generate_request], self.until(request))
            (result,) = await unless_gone(request, queued)
            assert isinstance(result, Generation)
        else:
            growing = await unless_gone(request, self._generator.generate(generate_request, self.until(request)))
            result = await self._generation_of(request, generate_request, growing)
        winner(result.best_index, "candidates")
        return result

    async def _generation_of(self, request: Request, generate_request: GenerateRequest, growing: Growing) -> Generation:
        """The candidates of a generation, with their texts."""
        count = int(growing.lengths.sum())
        return await self.aside(
            lambda: generation.generation_of(self.engine, generate_request, growing), request, count
        )

    async def read_generation(self, request: Request, prompt: Item, options: GenerateOptions) -> GenerateRequest:
        """Read and check what is to be generated."""
        if not self.generates:
            raise InputError("n: this model has no language model to generate with; pass candidates")
        if self._generator is None:
            raise InputError("n: this artifact was written by an earlier version of bonnx; export it again to generate")
        check_texts([ClientRequest(prompt, ())], self.engine, self.settings, truncate=False)
        generate_request = await self.aside(
            lambda: read_generate_request(self.engine, prompt, options), request, size(request)
        )
        check_size(generate_request.shape, self.settings)
        return generate_request

    async def aside(self, work: Callable[[], T], request: Request, size: int) -> T:
        """Do some work: at once, or in another thread if it takes long, so that it does not delay other requests.

        Args:
            work: reads a request, or writes an answer.
            request: the request whose deadline applies.
            size: maximum number of characters, tokens or bytes that the work processes.
        """
        if size <= _SHORT:
            return work()
        return await self._elsewhere(work, request)

    async def _elsewhere(self, work: Callable[[], T], request: Request) -> T:
        waiting = asyncio.get_running_loop().run_in_executor(self._readers, work)
        try:
            return await unless_gone(request, asyncio.wait_for(waiting, self.until(request) - time.monotonic()))
        except asyncio.TimeoutError:
            raise DeadlineError from None

    async def call(
        self, request: Request, graph: str, run: Callable[[Stop], Sequence[Array]], shape: Shape
    ) -> Sequence[Array]:
        """One run of a graph, by its name."""
        check_size(shape, self.settings)
        add_up(request, tokens=shape.prompt + shape.candidates * shape.length)
        batcher = self._generating if graph == "generate" else self._ranking
        (outputs,) = await unless_gone(request, batcher.put([GraphRequest(run, shape)], self.until(request)))
        return cast("Sequence[Array]", outputs)

    async def watch(
        self, request: Request, prompt: Item, options: GenerateOptions, deadline: float | None
    ) -> GenerationStream:
        """Stream a generation; it is cut off at its deadline or when the request times out.

        Raises:
            QueueFullError: too many generations wait.
            InputError: an option or the prompt is invalid.
        """
        generate_request = await self.read_generation(request, prompt, options)
        assert self._generator is not None
        left = max(0.001, self.until(request) - time.monotonic())
        ticket = self._generator.put(generate_request, deadline=clock(min(left, deadline or left)), watched=True)

        def read(growing: Growing) -> Awaitable[Generation]:
            return self._generation_of(request, generate_request, growing)

        return GenerationStream(self._generator, ticket, read)

    async def search(self, request: Request, work: Callable[[Stop], T]) -> T:
        """Do a search in one of the threads for them; it is told to stop when the client disconnects.

        Raises:
            QueueFullError: the maximum number of searches is under way.
        """
        if self._searches >= self.settings.max_searches:
            raise QueueFullError(self._searches, 1)
        self._searches += 1
        stop, loop = self._make_stop(), asyncio.get_running_loop()
        future = self._searchers.submit(self._noting_changes, lambda: work(stop))
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release))
        try:
            return await unless_gone(request, asyncio.wrap_future(future))
        finally:
            stop.terminate = True

    def _release(self) -> None:
        self._searches -= 1

    async def cut(
        self,
        request: Request,
        prompt: Item,
        options: GenerateOptions,
        deadline: float | None,
        on_state: Callable[[Generation], object] | None = None,
    ) -> Generation:
        """One generation, cut off at its deadline; `on_state` is called with it while it grows."""
        states = await self.watch(request, prompt, options, deadline)
        result = await unless_gone(request, states.result(on_state))
        winner(result.best_index, "candidates")
        return result

    def _run(self, requests: Sequence[Batchable], stop: Stop) -> Sequence[object]:
        """Run a batch, whose requests are of one kind."""
        return self._noting_changes(lambda: self._results(requests, stop))

    def _results(self, requests: Sequence[Batchable], stop: Stop) -> Sequence[object]:
        if graphs := [each for each in requests if isinstance(each, GraphRequest)]:
            return [each.run(stop) for each in graphs]
        if generations := [each for each in requests if isinstance(each, GenerateRequest)]:
            return generation.run_together(self.engine, generations, stop)
        rankings = [each for each in requests if isinstance(each, RankRequest)]
        results = ranking.run_together(self.engine, rankings, stop)
        # Not an error of the batch: other rankings of the same HTTP request may have a winner.
        return [_Lost(result) if isinstance(result, NoWinnerError) else result for result in results]

    def _noting_changes(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except ArtifactError:
            # The artifact was changed on disk: from now on every answer reports it.
            self.broken = True
            raise


@dataclass(frozen=True)
class _Lost:
    """A ranking that has no winner."""

    error: NoWinnerError


def _open(settings: UpstreamSettings) -> Upstream:
    # Its packages are needed only where there is an upstream.
    from ..upstream.client import Upstream

    return Upstream(**dataclasses.asdict(settings))

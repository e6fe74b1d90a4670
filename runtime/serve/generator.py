"""Generations of all clients, a token at a time: each joins when its prompt has been read and leaves when it ends.

One thread does all the work, a little at a time: it reads a piece of a prompt, or lets a batch of generations grow by a
token. What comes next is what has had the least of the processor's time, so neither a long prompt nor a generation with
many candidates makes the others wait for more than one piece of its work.

Generations grow in one batch where that saves time. Joining saves reading the weights once more for each token, and it
costs padding: prompts and candidates of different lengths lie in rectangles. If the padding would take longer than the
weights, a generation grows in a batch of its own.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from bonnx.errors import ArtifactError

from ..artifact.folder import WEIGHTS
from ..artifact.limits import TooLargeError
from ..artifact.manifest import Manifest
from ..engine.engine import Engine
from ..generate.continuous import ContinuousBatch
from ..generate.decoding import open_rows, runs_static
from ..generate.growing import Growing
from ..generate.prompts import Joining, ReadPrompt, read_prompts
from ..generate.request import GenerateRequest
from ..generate.rows import check_decode
from ..generate.run import ends_in_stop
from ..generate.static_rows import room_for
from .batcher import DeadlineError, Observer, QueueFullError

__all__ = ["Generator", "Ticket", "is_brief"]

_LOG = logging.getLogger("bonnx.serve")
# Tokens of prompts that are read at once, between two tokens of the generations that grow.
_PIECE = 256
# What two cores do in a second, roughly: bytes of weights that they read, and multiplications. Only which of two ways
# is taken depends on it.
_BYTES, _PRODUCTS = 10e9, 50e9
# With more candidates the products take longer than reading the weights. Such a request gains nothing from company, and
# would slow it down: by itself it has its share of the time.
_ENOUGH = 20
# A generation of at most so many seconds is computed in one run of `generate`.
_BRIEF = 0.2


def is_brief(manifest: Manifest, request: GenerateRequest) -> bool:
    """Whether a generation takes so little time that others can wait for it.

    Then one run of `generate`, which others can share from its beginning, is the better way: it steers no token from
    outside. With small models that steering takes longer than the token.
    """
    if request.options.needs_host:
        return False
    weights = weights_size(manifest)
    of_token = max(weights / _BYTES, request.options.n * weights / 4 / _PRODUCTS)
    return request.options.max_new_tokens * of_token <= _BRIEF


def weights_size(manifest: Manifest) -> int:
    """Bytes of the weights of all graphs together."""
    return sum(file.size for name, file in manifest.files.items() if name.endswith(WEIGHTS))


@dataclass(eq=False)
class Ticket:
    """A client's generation.

    Attributes:
        request: what to generate.
        joining: the same, while its prompt is read.
        bytes: of its keys and values when it has grown to its limit.
        watched: whether states other than the last one are wanted.
        loop: of the client.
        given_up: the client has disconnected or its time is up: nobody waits for the result.
        read_alone: its prompt was read with others, and that failed.
    """

    request: GenerateRequest
    joining: Joining
    bytes: int
    watched: bool
    loop: asyncio.AbstractEventLoop
    given_up: bool = False
    read_alone: bool = False
    _newest: Growing | None = None
    _ended: bool = False
    _error: BaseException | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, newest: Growing | None = None, *, ended: bool = False, error: BaseException | None = None) -> None:
        """Show the client the newest state, from any thread; a slow reader misses states."""
        if newest is not None:
            self._newest = newest
        self._ended, self._error = self._ended or ended, self._error or error
        try:
            self.loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:
            # The event loop is closed: the server was stopped, and no client waits.
            self.given_up = True

    async def states(self) -> AsyncIterator[Growing]:
        """The newest state, whenever there is one; the last one is the result.

        Raises:
            Exception: the generation failed.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            ended, newest, self._newest = self._ended, self._newest, None
            if self._error is not None:
                raise self._error
            if newest is not None:
                yield newest
            if ended:
                return

    async def result(self) -> Growing:
        """The last state.

        Raises:
            Exception: the generation failed.
        """
        last: Growing | None = None
        async for state in self.states():
            last = state
        assert last is not None
        return last


class _Lane:
    """Work that shares the processor with that of other lanes.

    Attributes:
        served: seconds that it has had.
    """

    def __init__(self, served: float) -> None:
        self.served = served


class _Group(_Lane):
    """Generations that grow in one batch.

    Attributes:
        alone: its one generation grows by itself.
        static: it runs in `decode_static`.
    """

    def __init__(self, batch: ContinuousBatch, served: float, *, alone: bool, static: bool) -> None:
        super().__init__(served)
        self.batch, self.alone, self.static = batch, alone, static
        self.tickets: dict[Growing, Ticket] = {}


class Generator:
    """Runs generations together.

    Args:
        engine: of a language model.
        observer: receives the measurements.
        max_waiting: maximum number of generations that wait for memory.
        max_rows: maximum number of candidates that grow in one batch.
        max_bytes: maximum size of the keys and values of all generations.
        guard: runs a piece of work, and notes what kind of error it raised.
    """

    def __init__(
        self,
        engine: Engine,
        observer: Observer,
        *,
        max_waiting: int,
        max_rows: int,
        max_bytes: int,
        guard: Callable[[Callable[[], object]], object],
    ) -> None:
        self._engine, self._observer, self._guard = engine, observer, guard
        self._max_waiting, self._max_rows, self._max_bytes = max_waiting, max_rows, max_bytes
        check_decode(engine.session("decode"))
        self._costs = _Costs(engine)
        self._waiting: deque[Ticket] = deque()
        self._reading: deque[Ticket] = deque()
        self._reader = _Lane(0.0)
        self._groups: list[_Group] = []
        self._bytes = 0
        self._pace = 0.1  # seconds for each generation, a running mean
        self._ended = time.monotonic()
        self._ready = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="bonnx-generate", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish the generations under way and those that wait, then end the thread."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        self._thread.join()

    def put(self, request: GenerateRequest, *, deadline: float | None = None, watched: bool = False) -> Ticket:
        """Queue a generation; to give it up, call `give_up`.

        Args:
            request: what to generate.
            deadline: on the clock of `time.monotonic`, when candidates that still grow are cut off; or None.
            watched: whether states other than the last one are wanted.

        Raises:
            TooLargeError: it would never fit into memory.
            QueueFullError: too many generations wait.
        """
        joining = Joining(request.prompt, request.options, ends_in_stop(self._engine, request), deadline)
        ticket = Ticket(request, joining, self._costs.bytes(request), watched, asyncio.get_running_loop())
        if ticket.bytes > self._max_bytes:
            options = request.options
            raise TooLargeError(
                f"n: {options.n} candidates of up to {options.max_new_tokens} tokens after a prompt of "
                f"{len(request.prompt)} take {ticket.bytes} bytes of keys and values, and this server holds "
                f"{self._max_bytes} (--generation-memory); ask for fewer, or set max_new_tokens"
            )
        with self._ready:
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(len(self._waiting), self._pace * len(self._waiting))
            self._waiting.append(ticket)
            self._observer.waiting("generate", len(self._waiting))
            self._ready.notify()
        return ticket

    async def generate(self, request: GenerateRequest, until: float) -> Growing:
        """One generation, when it has ended.

        Args:
            request: what to generate.
            until: the deadline of the request, on the clock of `time.monotonic`.

        Raises:
            QueueFullError: too many generations wait.
            DeadlineError: the deadline passed.
            Exception: the generation failed.
        """
        ticket = self.put(request)
        try:
            return await asyncio.wait_for(ticket.result(), max(0.0, until - time.monotonic()))
        except asyncio.TimeoutError:
            raise DeadlineError from None
        finally:
            self.give_up(ticket)

    def give_up(self, ticket: Ticket) -> None:
        """Drop a generation whose result is not needed: it leaves at the next token. One that has ended stays."""
        ticket.given_up = True
        with self._ready:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._observer.waiting("generate", len(self._waiting))
            self._ready.notify()

    def _serve(self) -> None:
        while True:
            with self._ready:
                while not (self._waiting or self._reading or self._groups):
                    if self._closing:
                        return
                    self._ready.wait()
            try:
                self._drop_given_up()
                self._admit()
                self._work()
            except Exception as e:
                # A thread that ended would leave every client waiting, so it continues after any failure.
                _LOG.exception("generations failed", extra={"notes": {"event": "failure", "batcher": "generate"}})
                self._fail_all(e)

    def _drop_given_up(self) -> None:
        for ticket in [ticket for ticket in self._reading if ticket.given_up]:
            self._reading.remove(ticket)
            self._bytes -= ticket.bytes
        for group in self._groups:
            for growing, ticket in [*group.tickets.items()]:
                if ticket.given_up:
                    group.batch.leave(growing)
                    self._leave(group, growing)
        self._groups = [group for group in self._groups if group.tickets]

    def _admit(self) -> None:
        """Begin with those that wait, in their order, as long as there is memory."""
        with self._ready:
            while self._waiting:
                ticket = self._waiting[0]
                if self._bytes + ticket.bytes > self._max_bytes:
                    break
                self._waiting.popleft()
                self._bytes += ticket.bytes
                if not self._reading:
                    self._reader.served = max(self._reader.served, self._least_served())
                self._reading.append(ticket)
            self._observer.waiting("generate", len(self._waiting))

    def _least_served(self) -> float:
        return min((group.served for group in self._groups), default=self._reader.served)

    def _work(self) -> None:
        """Do a piece of the work that has had the least time."""
        lanes = [*self._groups, *([self._reader] if self._reading else [])]
        if not lanes:
            return
        lane = min(lanes, key=lambda lane: lane.served)
        start = time.monotonic()
        if isinstance(lane, _Group):
            self._step(lane)
        else:
            self._read()
        lane.served += time.monotonic() - start

    def _read(self) -> None:
        """Read a piece of the first prompt, or all of it together with others that are short."""
        tickets, count = self._next_prompts()
        joining = [ticket.joining for ticket in tickets]
        start = time.monotonic()
        logits = any(each.options.top_log_probs for each in joining)
        read: list[ReadPrompt] = []
        try:
            self._guard(
                lambda: read.extend(read_prompts(self._engine.session("prefill"), joining, count, logits=logits))
            )
        except Exception as e:
            # One bad request must not fail the others: they are read again, one by one.
            if len(tickets) == 1:
                self._fail(tickets[0], e)
            for ticket in tickets:
                ticket.read_alone = True
            self._reading.extendleft(reversed(tickets if len(tickets) > 1 else []))
            return
        lengths = [len(each.prompt) if count is None else count for each in joining]
        self._observer.ran("prefill", len(tickets), sum(lengths), len(lengths) * max(lengths), time.monotonic() - start)
        if count is not None:
            self._reading.append(tickets[0])
            return
        for ticket, prompt in zip(tickets, read, strict=True):
            self._join(ticket, prompt)

    def _next_prompts(self) -> tuple[list[Ticket], int | None]:
        """Take the tickets whose prompts are read next, and how many tokens, None for all that are left."""
        first = self._reading.popleft()
        left = len(first.joining.prompt) - first.joining.read
        if left > _PIECE and self._may_join(first):
            return [first], _PIECE
        tickets = [first]
        if first.joining.read or first.read_alone or not self._may_join(first):
            return tickets, None
        longest = len(first.joining.prompt)
        for ticket in [*self._reading]:
            length = len(ticket.joining.prompt)
            joint = max(longest, length)
            if ticket.joining.read or ticket.read_alone or not self._may_join(ticket):
                continue
            if joint * (len(tickets) + 1) > _PIECE or 2 * length < joint or 2 * longest < joint:
                continue
            self._reading.remove(ticket)
            tickets.append(ticket)
            longest = joint
        return tickets, None

    def _may_join(self, ticket: Ticket) -> bool:
        """Whether a generation may run with others; with some rotations a long one may not."""
        request = ticket.request
        return len(request.prompt) + request.options.max_new_tokens <= self._engine.joint_limit

    def _grows_alone(self, ticket: Ticket) -> bool:
        """Whether a generation grows in a batch of its own."""
        return ticket.request.options.n > _ENOUGH or not self._may_join(ticket)

    def _join(self, ticket: Ticket, read: ReadPrompt) -> None:
        """Let a generation grow, in the first batch that it suits."""
        group = next((group for group in self._groups if self._suits(ticket, group)), None)
        if group is None:
            options = ticket.request.options
            batch = ContinuousBatch(open_rows(self._engine, options), self._engine.manifest.scoring.step_token)
            group = _Group(
                batch,
                self._least_served(),
                alone=self._grows_alone(ticket),
                static=runs_static(self._engine, options),
            )
            self._groups.append(group)
        group.tickets[group.batch.join(read, ticket.joining)] = ticket

    def _suits(self, ticket: Ticket, group: _Group) -> bool:
        n = ticket.request.options.n
        if group.alone or self._grows_alone(ticket) or group.batch.rows + n > self._max_rows:
            return False
        if group.static != runs_static(self._engine, ticket.request.options):
            return False
        pairs, copied = group.batch.padding(len(ticket.request.prompt), n)
        return self._costs.padding(pairs, copied) <= self._costs.weights

    def _step(self, group: _Group) -> None:
        """Let the generations of a batch grow by a token."""
        start, count, rows = time.monotonic(), len(group.tickets), group.batch.rows
        grown: list[Growing] = []
        try:
            self._guard(lambda: grown.extend(group.batch.step()))
        except Exception as e:
            self._fail_largest(group, e)
            return
        self._observer.ran("decode", count, rows, rows, time.monotonic() - start)
        for growing in grown:
            ticket = group.tickets[growing]
            if (growing.reasons >= 0).all():
                self._leave(group, growing)
                ticket.tell(growing, ended=True)
                now = time.monotonic()
                self._pace += 0.1 * (min(10.0, now - self._ended) - self._pace)
                self._ended = now
            elif ticket.watched:
                ticket.tell(growing.snapshot())
        if not group.tickets:
            self._groups.remove(group)

    def _leave(self, group: _Group, growing: Growing) -> None:
        self._bytes -= group.tickets.pop(growing).bytes

    def _fail_largest(self, group: _Group, error: Exception) -> None:
        """After a failed run, which changed nothing: the largest generation fails, and the others go on without it."""
        failing = [*group.tickets]
        if not isinstance(error, ArtifactError):
            failing = [max(group.tickets, key=lambda growing: group.tickets[growing].bytes)]
        for growing in failing:
            ticket = group.tickets[growing]
            group.batch.leave(growing)
            self._leave(group, growing)
            ticket.tell(ended=True, error=error)
        if not group.tickets:
            self._groups.remove(group)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self._bytes -= ticket.bytes
        ticket.tell(ended=True, error=error)

    def _fail_all(self, error: Exception) -> None:
        with self._ready:
            tickets = [*self._waiting, *self._reading, *(t for group in self._groups for t in group.tickets.values())]
            self._waiting.clear()
            self._reading.clear()
            self._groups.clear()
            self._bytes = 0
        for ticket in tickets:
            ticket.tell(ended=True, error=error)


class _Costs:
    """What generations take."""

    def __init__(self, engine: Engine) -> None:
        self._engine, manifest = engine, engine.manifest
        keys = [value.shape for value in manifest.graphs["decode"].inputs if value.name.startswith("key.")]
        features = sum(int(shape[1]) * int(shape[3]) for shape in keys)
        self._token = 8 * features
        # Each head has a product with a key and one with a value.
        self._pair = 2 * features * manifest.size("num_heads") // int(keys[0][1])
        self.weights = weights_size(manifest)

    def bytes(self, request: GenerateRequest) -> int:
        """Of the keys and values of a generation that grows to its limit, twice: they grow by being copied."""
        n, new = request.options.n, request.options.max_new_tokens
        tokens = room_for(n, new) if runs_static(self._engine, request.options) else n * new
        return self._token * (len(request.prompt) + 2 * tokens)

    def padding(self, pairs: int, copied: int) -> float:
        """Padding for each token, in bytes of weights that take as long to read.

        Args:
            pairs: of a candidate and a prompt's token.
            copied: tokens whose keys and values are copied.
        """
        return pairs * self._pair * _BYTES / _PRODUCTS + 2 * copied * self._token

"""The thread that lets all clients' generations grow, a token at a time."""

import asyncio
import contextlib
import itertools
import time
from types import SimpleNamespace

import httpx
import msgspec
import numpy as np
import pytest

from bonnx.errors import ArtifactError
from bonnx.runtime.artifact.limits import TooLargeError
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.generate.continuous import ContinuousBatch
from bonnx.runtime.generate.growing import DEADLINE
from bonnx.runtime.generate.prompts import Joining, read_prompts
from bonnx.runtime.generate.request import read_request
from bonnx.runtime.generate.run import run_together
from bonnx.runtime.generate.static_rows import StaticRows
from bonnx.runtime.serve import generator as module
from bonnx.runtime.serve.batcher import DeadlineError, QueueFullError
from bonnx.runtime.serve.generator import Generator, is_brief
from tests.runtime.generate.test_continuous import PROMPTS, check_as_alone, draw_request
from tests.runtime.serve.servers import served


class Observer:
    """Keeps the measurements."""

    def __init__(self):
        self.runs, self.queue = [], []

    def waiting(self, batcher, count):
        self.queue.append(count)

    def ran(self, batcher, works, real, padded, seconds):
        self.runs.append((batcher, works, real, padded))


@contextlib.contextmanager
def running(engine, guard=lambda work: work(), **limits):
    """A generator, and what it has observed."""
    observer = Observer()
    limits = {"max_waiting": 64, "max_rows": 64, "max_bytes": 2**30} | limits
    generator = Generator(engine, observer, guard=guard, **limits)
    try:
        yield generator, observer
    finally:
        generator.close()


def fixed(engine, n=1, tokens=16, prompt=PROMPTS[0], **options):
    """A request whose candidates have exactly so many tokens."""
    return read_request(engine, prompt, {"n": n, "max_new_tokens": tokens, "stop": [], **options})


def later(seconds=60):
    return time.monotonic() + seconds


@pytest.mark.parametrize("name", ["engine", "static_engine"])
def test_64_clients_get_what_they_get_alone(name, rng, monkeypatch, request):
    engine = request.getfixturevalue(name)
    # Prompts are read in pieces, and some clients watch, leave or come late.
    monkeypatch.setattr(module, "_PIECE", 8)
    requests = [draw_request(engine, rng) for _ in range(64)]
    fates = rng.choice(["waits", "waits", "watches", "leaves"], 64)
    delays = rng.uniform(0, 0.5, 64)

    async def client(generator, request, fate, delay):
        await asyncio.sleep(delay)
        if fate == "waits":
            return await generator.generate(request, later())
        ticket = generator.put(request, watched=True)
        seen = []
        async for state in ticket.states():
            seen.append(state.length)
            last = state
            if fate == "leaves":
                generator.give_up(ticket)
                return None
        assert seen == sorted(set(seen))
        return last

    async def work():
        with running(engine) as (generator, observer):
            tasks = [client(generator, *each) for each in zip(requests, fates, delays, strict=True)]
            return await asyncio.gather(*tasks), observer

    results, observer = asyncio.run(work())
    for request, fate, growing in zip(requests, fates, results, strict=True):
        if fate != "leaves":
            check_as_alone(engine, request, growing)
    assert max(works for batcher, works, *_ in observer.runs if batcher == "decode") > 4
    assert {batcher for batcher, *_ in observer.runs} == {"prefill", "decode"}


def test_a_long_prompt_is_read_between_the_tokens_of_others(engine, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 2)
    long = fixed(engine, prompt=[5] * 40, tokens=4)
    # By the real clock one kind of work could be twice as slow as the other.
    ticks = itertools.count()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))

    async def work():
        with running(engine) as (generator, observer):
            tickets = [generator.put(fixed(engine, tokens=50)), generator.put(long)]
            return await asyncio.gather(*(ticket.result() for ticket in tickets)), observer

    (_, grown), observer = asyncio.run(work())
    check_as_alone(engine, long, grown)
    kinds = [batcher for batcher, *_ in observer.runs]
    pieces = [i for i, kind in enumerate(kinds) if kind == "prefill"]
    assert len(pieces) >= 20
    # Once the first prompt has been read, its tokens come between the pieces of the other.
    assert max(np.diff(pieces[10:])) <= 3
    assert kinds[pieces[10] : pieces[-1]].count("decode") >= 10


@pytest.mark.parametrize(("n", "tokens", "rows", "slots"), [(3, 20, 4, 64), (4, 54, 4, 64), (5, 40, 8, 64)])
def test_the_room_of_a_static_cache_is_counted(static_engine, n, tokens, rows, slots):
    """A power of two of rows and of tokens, of which the latter are at least 64."""
    request = fixed(static_engine, n=n, tokens=tokens)
    not_static = fixed(static_engine, n=n, tokens=tokens, top_k=3)
    costs, prompt = module._Costs(static_engine), len(request.prompt)
    token = costs.bytes(not_static) // (prompt + 2 * n * tokens)
    assert costs.bytes(request) == token * (prompt + 2 * rows * slots)
    held = StaticRows(static_engine.session)
    (prompt_read,) = read_prompts(
        static_engine.session("prefill"), [joining := Joining(request.prompt, request.options)]
    )
    batch = ContinuousBatch(held, None)
    batch.join(prompt_read, joining)
    batch.step()
    shape = held._run.values["key.0"].shape()
    assert (shape[0], shape[2]) == (rows, slots)


def test_memory_is_counted_before_it_is_taken(engine):
    request = fixed(engine, n=4, tokens=30)
    with running(engine) as (generator, _):
        size = generator._costs.bytes(request)

    async def work():
        with running(engine, max_bytes=2 * size, max_waiting=3) as (generator, observer):
            tickets, most, refusals = [], 0, []
            while len(tickets) < 9:
                try:
                    tickets.append(generator.put(request))
                except QueueFullError as e:
                    refusals.append(e.retry_after)
                    await asyncio.sleep(0.001)
                most = max(most, generator._bytes)
            assert min(refusals) >= 1
            results = await asyncio.gather(*(ticket.result() for ticket in tickets))
            assert generator._bytes == 0
            return results, most, observer

    results, most, observer = asyncio.run(work())
    assert 0 < most <= 2 * size
    for growing in results:
        check_as_alone(engine, request, growing)
    assert max(real for batcher, _, real, _ in observer.runs if batcher == "decode") == 8
    assert max(observer.queue) == 3


def test_one_that_is_larger_than_all_memory_is_refused(engine):
    async def work():
        with running(engine, max_bytes=10**5) as (generator, _):
            with pytest.raises(TooLargeError, match=r"8 candidates of up to 40 tokens .* this server holds 100000"):
                generator.put(fixed(engine, n=8, tokens=40))
            return await generator.generate(fixed(engine, tokens=3), later())

    assert asyncio.run(work()).length == 3


def test_candidates_that_would_cost_too_much_padding_grow_apart(engine):
    async def work(weights):
        with running(engine) as (generator, observer):
            generator._costs.weights = weights
            requests = [fixed(engine, n=n, seed=n) for n in (16, 1, 1)]
            results = await asyncio.gather(*(generator.generate(request, later()) for request in requests))
            for request, growing in zip(requests, results, strict=True):
                check_as_alone(engine, request, growing)
            return {real for batcher, _, real, _ in observer.runs if batcher == "decode"}

    assert 18 in asyncio.run(work(2**40))
    assert asyncio.run(work(0)) <= {16, 1, 2}


def test_many_candidates_grow_apart_from_those_of_others(engine):
    async def work():
        with running(engine) as (generator, observer):
            requests = [fixed(engine, n=n, seed=n) for n in (21, 19, 1, 21)]
            results = await asyncio.gather(*(generator.generate(request, later()) for request in requests))
            for request, growing in zip(requests, results, strict=True):
                check_as_alone(engine, request, growing)
            return {real for batcher, _, real, _ in observer.runs if batcher == "decode"}

    rows = asyncio.run(work())
    assert 21 in rows
    # Those of 19 and 1 may grow together.
    assert rows <= {21, 20, 19, 1}


def test_a_request_has_its_time(engine):
    async def work():
        with running(engine) as (generator, _):
            slow = fixed(engine, n=64, tokens=50)
            with pytest.raises(DeadlineError):
                await generator.generate(slow, time.monotonic() + 0.02)
            # It has left, so the thread is free.
            quick = await asyncio.wait_for(generator.generate(fixed(engine), later()), 20)
            ticket = generator.put(slow, deadline=time.monotonic() + 0.02)
            cut = await ticket.result()
            until = time.monotonic() + 20
            while generator._bytes:
                assert time.monotonic() < until
                await asyncio.sleep(0.01)
            return quick, cut

    quick, cut = asyncio.run(work())
    assert quick.length == 16
    assert cut.length < 50
    assert (cut.reasons == DEADLINE).all()


def test_after_a_failed_run_the_largest_generation_fails(engine):
    errors = [MemoryError("no room")]

    async def work():
        def guard(work):
            if errors and any(len(group.tickets) == 3 for group in generator._groups):
                raise errors.pop()
            return work()

        with running(engine, guard) as (generator, _):
            requests = [fixed(engine, n=n, tokens=40, seed=n) for n in (1, 5, 2)]
            tickets = [generator.put(request) for request in requests]
            results = await asyncio.gather(*(ticket.result() for ticket in tickets), return_exceptions=True)
            assert generator._bytes == 0
            return requests, results

    requests, (first, largest, third) = asyncio.run(work())
    assert str(largest) == "no room"
    check_as_alone(engine, requests[0], first)
    check_as_alone(engine, requests[2], third)


def test_an_artifact_that_was_changed_fails_all(engine):
    calls = []

    def guard(work):
        calls.append(1)
        if len(calls) > 6:
            raise ArtifactError("it was changed")
        return work()

    async def work():
        with running(engine, guard) as (generator, _):
            tickets = [generator.put(fixed(engine, n=n)) for n in (1, 2, 3)]
            return await asyncio.gather(*(ticket.result() for ticket in tickets), return_exceptions=True)

    assert [str(error) for error in asyncio.run(work())] == ["it was changed"] * 3


def test_a_prompt_that_cannot_be_read_fails_alone(engine):
    bad = fixed(engine, seed=13)

    def read(session, joining, *args, **options):
        if any(each.options.seed == 13 for each in joining):
            raise MemoryError("this one")
        return module_read(session, joining, *args, **options)

    module_read = module.read_prompts

    async def work():
        with running(engine) as (generator, _), pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "read_prompts", read)
            requests = [fixed(engine), bad, fixed(engine, seed=3)]
            tickets = [generator.put(request) for request in requests]
            return requests, await asyncio.gather(*(t.result() for t in tickets), return_exceptions=True)

    requests, (first, error, third) = asyncio.run(work())
    assert str(error) == "this one"
    check_as_alone(engine, requests[0], first)
    check_as_alone(engine, requests[2], third)


def test_what_was_taken_is_finished_before_it_closes(engine):
    async def work():
        with running(engine) as (generator, _):
            tickets = [generator.put(fixed(engine, n=n)) for n in (1, 2, 3)]
            await asyncio.to_thread(generator.close)
            return await asyncio.gather(*(ticket.result() for ticket in tickets))

    assert [growing.length for growing in asyncio.run(work())] == [16] * 3


def test_an_older_artifact_still_ranks(countdown):
    older = open_engine(countdown)
    graphs = {**older.manifest.graphs}
    inputs = [value for value in graphs["decode"].inputs if value.name != "sources"]
    graphs["decode"] = msgspec.structs.replace(graphs["decode"], inputs=inputs)
    session = SimpleNamespace(graph=graphs["decode"], make_stop=older.session("rank").make_stop)
    given = older.session
    older.session = lambda name: session if name == "decode" else given(name)
    with served(older) as url:
        body = {"prompt": PROMPTS[0], "candidates": ["24-20=4;7-4=3;3/3=1;", "24/3=8;"]}
        assert httpx.post(f"{url}/v1/best-of-n", json=body, timeout=60).json()["best_index"] == 0
        refused = httpx.post(f"{url}/v1/best-of-n", json={"prompt": PROMPTS[0], "n": 2}, timeout=60)
    assert refused.status_code == 400
    assert "earlier version of bonnx; export it again" in refused.json()["message"]


def test_which_generations_are_brief(engine):
    # By the size of the weights: 13 MB are read in 1.3 ms.
    assert is_brief(engine.manifest, fixed(engine, n=16, tokens=40))
    assert not is_brief(engine.manifest, fixed(engine, n=128, tokens=40))
    (alone,) = run_together(engine, [fixed(engine)])
    assert len(alone.candidates) == 1

"""The queue in front of a model, with requests that do nothing."""

import asyncio
import threading
import time

import pytest

from bonnx.runtime.batching import Shape, padded_tokens
from bonnx.runtime.serve.batcher import Batcher, DeadlineError, QueueFullError


class Request:
    def __init__(self, name, key="same", length=1):
        self.name, self.key, self.prompt_slot, self.tokens = name, key, name, length
        self.shape = Shape(1, 0, length)


class Stop:
    terminate = False


class Observer:
    def __init__(self):
        self.runs = []

    def waiting(self, batcher, count):
        pass

    def ran(self, batcher, requests, real, padded, seconds):
        self.runs.append((requests, real, padded))


class Model:
    """Runs requests when the gate is open, and remembers which ran together."""

    def __init__(self):
        self.gate, self.groups, self.stopped = threading.Event(), [], 0
        self.gate.set()

    def run(self, requests, stop):
        while not self.gate.wait(0.002):
            if stop.terminate:
                self.stopped += 1
                raise RuntimeError("terminated")
        self.groups.append([request.name for request in requests])
        if any(request.name == "bad" for request in requests):
            raise RuntimeError("cannot run")
        return [ValueError(request.name) if request.name == "error" else request.name * 2 for request in requests]


@pytest.fixture
def make():
    made = []

    def make(most=100, tokens=8, patience=0.0):
        model, observer = Model(), Observer()
        fits = lambda columns, shape: padded_tokens(columns, shape) <= tokens  # noqa: E731
        cost = lambda columns, shape: 1 + padded_tokens(columns, shape)  # noqa: E731
        batcher = Batcher("test", model.run, fits, cost, Stop, observer, max_waiting=most, patience=patience)
        made.append((batcher, model))
        return batcher, model, observer

    yield make
    for batcher, model in made:
        model.gate.set()
        batcher.close()


def soon(seconds=10.0):
    return time.monotonic() + seconds


async def behind_closed_gate(batcher, model):
    """A run that holds the batcher, so that others gather behind it."""
    model.gate.clear()
    first = asyncio.ensure_future(batcher.put([Request("first", key=None)], soon()))
    while batcher._running is None:
        await asyncio.sleep(0.001)
    return first


def test_what_waits_runs_together_within_bounds(make):
    batcher, model, observer = make(tokens=8)

    async def main():
        first = await behind_closed_gate(batcher, model)
        others = [asyncio.ensure_future(batcher.put([Request(f"w{i}")], soon())) for i in range(11)]
        alone = asyncio.ensure_future(batcher.put([Request("x", key="other")], soon()))
        await asyncio.sleep(0.01)
        model.gate.set()
        assert await first == ["firstfirst"]
        assert [(await other)[0] for other in others] == [f"w{i}w{i}" for i in range(11)]
        assert await alone == ["xx"]

    asyncio.run(main())
    assert sorted(map(len, model.groups)) == [1, 1, 3, 8]
    assert sorted(requests for requests, _, _ in observer.runs) == [1, 1, 3, 8]
    # The oldest never stands behind those that came after it.
    assert model.groups[1][0] == "w0"


def test_an_idle_model_waits_for_company_only_if_told_to(make):
    batcher, model, _ = make(tokens=4, patience=600.0)

    async def main():
        requests = [asyncio.ensure_future(batcher.put([Request(f"w{i}")], soon())) for i in range(4)]
        # The run is full, so nobody waits ten minutes.
        await asyncio.gather(*requests)

    asyncio.run(main())
    assert sorted(map(len, model.groups)) == [4]


def test_a_full_queue_refuses_and_says_when_to_come_back(make):
    batcher, model, _ = make(most=2)

    async def main():
        first = await behind_closed_gate(batcher, model)
        waiting = [asyncio.ensure_future(batcher.put([Request(name)], soon())) for name in ("a", "b")]
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFullError) as e:
            await batcher.put([Request("c")], soon())
        assert e.value.retry_after >= 1
        model.gate.set()
        await asyncio.gather(first, *waiting)
        assert await batcher.put([Request("c")], soon()) == ["cc"]

    asyncio.run(main())


def test_several_are_taken_all_or_none(make):
    batcher, model, _ = make(most=3)

    async def main():
        first = await behind_closed_gate(batcher, model)
        with pytest.raises(QueueFullError):
            await batcher.put([Request(str(i)) for i in range(4)], soon())
        three = asyncio.ensure_future(batcher.put([Request(str(i)) for i in range(3)], soon()))
        await asyncio.sleep(0.01)
        model.gate.set()
        assert await three == ["00", "11", "22"]
        await first

    asyncio.run(main())
    assert sorted(name for group in model.groups for name in group) == ["0", "1", "2", "first"]


def test_who_is_late_does_not_run(make):
    batcher, model, _ = make()

    async def main():
        first = await behind_closed_gate(batcher, model)
        with pytest.raises(DeadlineError):
            await batcher.put([Request("late")], soon(0.02))
        model.gate.set()
        await first
        assert await batcher.put([Request("next")], soon()) == ["nextnext"]

    asyncio.run(main())
    assert ["late"] not in model.groups


def test_a_run_that_nobody_waits_for_is_ended(make):
    batcher, model, _ = make()

    async def main():
        first = await behind_closed_gate(batcher, model)
        first.cancel()
        while not model.stopped:
            await asyncio.sleep(0.001)
        model.gate.set()
        assert await batcher.put([Request("next")], soon()) == ["nextnext"]

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_retry_that_nobody_waits_for_is_ended(make):
    batcher, model, _ = make()

    def fail_together(requests, stop):
        if len(requests) > 1:
            model.gate.clear()
            raise RuntimeError("cannot run together")
        return Model.run(model, requests, stop)

    batcher._run = fail_together

    async def main():
        first = await behind_closed_gate(batcher, model)
        requests = [asyncio.ensure_future(batcher.put([Request(name)], soon())) for name in "abc"]
        await asyncio.sleep(0.01)
        model.gate.set()
        await first
        while batcher._running is None or len(batcher._running[0]) != 1:
            await asyncio.sleep(0.001)
        for request in requests:
            request.cancel()
        while not model.stopped:
            await asyncio.sleep(0.001)
        model.gate.set()
        assert await batcher.put([Request("next")], soon()) == ["nextnext"]

    asyncio.run(asyncio.wait_for(main(), 20))
    # Those that had given up before their turn were not run again.
    assert model.groups == [["first"], ["next"]]


def test_a_failure_is_its_own(make):
    batcher, model, _ = make()

    async def main():
        first = await behind_closed_gate(batcher, model)
        names = ["a", "bad", "error", "b"]
        requests = [asyncio.ensure_future(batcher.put([Request(name)], soon())) for name in names]
        await asyncio.sleep(0.01)
        model.gate.set()
        await first
        return await asyncio.gather(*requests, return_exceptions=True)

    a, bad, error, b = asyncio.run(main())
    assert (a, b) == (["aa"], ["bb"])
    assert isinstance(bad, RuntimeError)
    assert isinstance(error, ValueError)


def test_a_batcher_survives_what_goes_wrong_in_it(make, monkeypatch):
    batcher, _, observer = make()

    def fail(*_):
        raise RuntimeError("cannot count")

    async def main():
        with monkeypatch.context() as patch:
            patch.setattr(batcher, "_choose", fail)
            with pytest.raises(RuntimeError, match="cannot count"):
                await batcher.put([Request("a")], soon())
            patch.setattr(observer, "ran", fail)
        assert await batcher.put([Request("b")], soon()) == ["bb"]

    asyncio.run(main())


def test_closing_finishes_what_was_taken(make):
    batcher, model, _ = make()

    async def main():
        first = await behind_closed_gate(batcher, model)
        requests = [asyncio.ensure_future(batcher.put([Request(f"w{i}")], soon())) for i in range(3)]
        await asyncio.sleep(0.01)
        closing = asyncio.get_running_loop().run_in_executor(None, batcher.close)
        model.gate.set()
        await closing
        assert await first == ["firstfirst"]
        assert [(await request)[0] for request in requests] == ["w0w0", "w1w1", "w2w2"]

    asyncio.run(main())

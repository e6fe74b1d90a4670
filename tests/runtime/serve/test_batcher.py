"""The queue in front of a model, with works that do nothing."""

import asyncio
import threading
import time

import pytest

from bonnx.runtime.batching import Shape, padded_tokens
from bonnx.runtime.serve.batcher import Lane, LateError, OverfullError


class Request:
    def __init__(self, name, key="same", length=1):
        self.name, self.key, self.prompt_slot, self.tokens = name, key, name, length
        self.shape = Shape(1, 0, length)


class Stop:
    terminate = False


class Watcher:
    def __init__(self):
        self.runs = []

    def waiting(self, lane, count):
        pass

    def ran(self, lane, works, real, padded, seconds):
        self.runs.append((works, real, padded))


class Model:
    """Runs works when the gate is open, and remembers which ran together."""

    def __init__(self):
        self.gate, self.groups, self.stopped = threading.Event(), [], 0
        self.gate.set()

    def run(self, works, stop):
        while not self.gate.wait(0.002):
            if stop.terminate:
                self.stopped += 1
                raise RuntimeError("terminated")
        self.groups.append([work.name for work in works])
        if any(work.name == "bad" for work in works):
            raise RuntimeError("cannot run")
        return [ValueError(work.name) if work.name == "error" else work.name * 2 for work in works]


@pytest.fixture
def make():
    made = []

    def make(most=100, tokens=8, patience=0.0, waste=0.5):
        model, watcher = Model(), Watcher()
        fits = lambda columns, shape: padded_tokens(columns, shape) <= tokens  # noqa: E731
        lane = Lane("test", model.run, fits, Stop, watcher, most_waiting=most, patience=patience, waste=waste)
        made.append((lane, model))
        return lane, model, watcher

    yield make
    for lane, model in made:
        model.gate.set()
        lane.close()


def soon(seconds=10.0):
    return time.monotonic() + seconds


async def behind_closed_gate(lane, model):
    """A run that holds the lane, so that others gather behind it."""
    model.gate.clear()
    first = asyncio.ensure_future(lane.put([Request("first", key=None)], soon()))
    while lane._running is None:
        await asyncio.sleep(0.001)
    return first


def test_what_waits_runs_together_within_bounds(make):
    lane, model, watcher = make(tokens=8)

    async def main():
        first = await behind_closed_gate(lane, model)
        others = [asyncio.ensure_future(lane.put([Request(f"w{i}")], soon())) for i in range(11)]
        alone = asyncio.ensure_future(lane.put([Request("x", key="other")], soon()))
        await asyncio.sleep(0.01)
        model.gate.set()
        assert await first == ["firstfirst"]
        assert [(await other)[0] for other in others] == [f"w{i}w{i}" for i in range(11)]
        assert await alone == ["xx"]

    asyncio.run(main())
    assert sorted(map(len, model.groups)) == [1, 1, 3, 8]
    assert sorted(works for works, _, _ in watcher.runs) == [1, 1, 3, 8]
    # The oldest never stands behind those that came after it.
    assert model.groups[1][0] == "w0"


def test_an_idle_model_waits_for_company_only_if_told_to(make):
    lane, model, _ = make(tokens=4, patience=600.0)

    async def main():
        works = [asyncio.ensure_future(lane.put([Request(f"w{i}")], soon())) for i in range(4)]
        # The run is full, so nobody waits ten minutes.
        await asyncio.gather(*works)

    asyncio.run(main())
    assert sorted(map(len, model.groups)) == [4]


def test_a_full_queue_refuses_and_says_when_to_come_back(make):
    lane, model, _ = make(most=2)

    async def main():
        first = await behind_closed_gate(lane, model)
        waiting = [asyncio.ensure_future(lane.put([Request(name)], soon())) for name in ("a", "b")]
        await asyncio.sleep(0.01)
        with pytest.raises(OverfullError) as e:
            await lane.put([Request("c")], soon())
        assert e.value.retry_after >= 1
        model.gate.set()
        await asyncio.gather(first, *waiting)
        assert await lane.put([Request("c")], soon()) == ["cc"]

    asyncio.run(main())


def test_several_are_taken_all_or_none(make):
    lane, model, _ = make(most=3)

    async def main():
        first = await behind_closed_gate(lane, model)
        with pytest.raises(OverfullError):
            await lane.put([Request(str(i)) for i in range(4)], soon())
        three = asyncio.ensure_future(lane.put([Request(str(i)) for i in range(3)], soon()))
        await asyncio.sleep(0.01)
        model.gate.set()
        assert await three == ["00", "11", "22"]
        await first

    asyncio.run(main())
    assert sorted(name for group in model.groups for name in group) == ["0", "1", "2", "first"]


def test_who_is_late_does_not_run(make):
    lane, model, _ = make()

    async def main():
        first = await behind_closed_gate(lane, model)
        with pytest.raises(LateError):
            await lane.put([Request("late")], soon(0.02))
        model.gate.set()
        await first
        assert await lane.put([Request("next")], soon()) == ["nextnext"]

    asyncio.run(main())
    assert ["late"] not in model.groups


def test_a_run_that_nobody_waits_for_is_ended(make):
    lane, model, _ = make()

    async def main():
        first = await behind_closed_gate(lane, model)
        first.cancel()
        while not model.stopped:
            await asyncio.sleep(0.001)
        model.gate.set()
        assert await lane.put([Request("next")], soon()) == ["nextnext"]

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_retry_that_nobody_waits_for_is_ended(make):
    lane, model, _ = make()

    def fail_together(works, stop):
        if len(works) > 1:
            model.gate.clear()
            raise RuntimeError("cannot run together")
        return Model.run(model, works, stop)

    lane._run = fail_together

    async def main():
        first = await behind_closed_gate(lane, model)
        works = [asyncio.ensure_future(lane.put([Request(name)], soon())) for name in "abc"]
        await asyncio.sleep(0.01)
        model.gate.set()
        await first
        while lane._running is None or len(lane._running[0]) != 1:
            await asyncio.sleep(0.001)
        for work in works:
            work.cancel()
        while not model.stopped:
            await asyncio.sleep(0.001)
        model.gate.set()
        assert await lane.put([Request("next")], soon()) == ["nextnext"]

    asyncio.run(asyncio.wait_for(main(), 20))
    # Those that had given up before their turn were not run again.
    assert model.groups == [["first"], ["next"]]


def test_a_failure_is_its_own(make):
    lane, model, _ = make()

    async def main():
        first = await behind_closed_gate(lane, model)
        names = ["a", "bad", "error", "b"]
        works = [asyncio.ensure_future(lane.put([Request(name)], soon())) for name in names]
        await asyncio.sleep(0.01)
        model.gate.set()
        await first
        return await asyncio.gather(*works, return_exceptions=True)

    a, bad, error, b = asyncio.run(main())
    assert (a, b) == (["aa"], ["bb"])
    assert isinstance(bad, RuntimeError)
    assert isinstance(error, ValueError)


def test_a_lane_survives_what_goes_wrong_in_it(make, monkeypatch):
    lane, _, watcher = make()

    def fail(*_):
        raise RuntimeError("cannot count")

    async def main():
        with monkeypatch.context() as patch:
            patch.setattr(lane, "_choose", fail)
            with pytest.raises(RuntimeError, match="cannot count"):
                await lane.put([Request("a")], soon())
            patch.setattr(watcher, "ran", fail)
        assert await lane.put([Request("b")], soon()) == ["bb"]

    asyncio.run(main())


def test_closing_finishes_what_was_taken(make):
    lane, model, _ = make()

    async def main():
        first = await behind_closed_gate(lane, model)
        works = [asyncio.ensure_future(lane.put([Request(f"w{i}")], soon())) for i in range(3)]
        await asyncio.sleep(0.01)
        closing = asyncio.get_running_loop().run_in_executor(None, lane.close)
        model.gate.set()
        await closing
        assert await first == ["firstfirst"]
        assert [(await work)[0] for work in works] == ["w0w0", "w1w1", "w2w2"]

    asyncio.run(main())

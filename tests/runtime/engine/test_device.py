"""A thread that captures has the device alone; others share it."""

import contextlib
import threading
import time

import pytest

from bonnx.runtime.engine.device import Device


class Watched(Device):
    """Counts who is inside, and notes what must not be."""

    def __init__(self):
        super().__init__()
        self.inside, self.most, self.faults = 0, 0, []

    def work(self, rng, nested):
        capture = rng.random() < 0.2
        with self.captured() if capture else self.used():
            self.inside += 1
            self.most = max(self.most, self.inside)
            if nested:
                with self.used():
                    time.sleep(rng.random() * 1e-3)
            else:
                time.sleep(rng.random() * 1e-3)
            if capture and self.inside != 1:
                self.faults.append(self.inside)
            self.inside -= 1


def test_nobody_is_there_while_one_captures(rng):
    device = Watched()
    generators = rng.spawn(6)

    def work(own):
        for _ in range(60):
            device.work(own, nested=own.random() < 0.5)

    threads = [threading.Thread(target=work, args=(own,)) for own in generators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert device.faults == []
    assert device.most > 1


@pytest.mark.parametrize("way", ["used", "captured"])
def test_an_error_frees_it(way):
    device = Device()
    with contextlib.suppress(MemoryError), getattr(device, way)():
        raise MemoryError
    entered = []

    def enter():
        with device.captured():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(10)
    assert entered == [True]


def test_an_interrupt_while_it_waits_frees_it():
    device, entered = Device(), []

    def enter():
        with device.used():
            entered.append(True)

    with device.used():
        wait = device._changed.wait_for

        def interrupted(free):
            # The second wait, for those who are inside.
            if device._captured:
                raise KeyboardInterrupt
            return wait(free)

        device._changed.wait_for = interrupted
        with contextlib.suppress(KeyboardInterrupt), device.captured():
            pass
        device._changed.wait_for = wait
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(10)
    assert entered == [True]

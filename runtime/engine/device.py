"""Who may use CUDA: all threads at once, or one that captures, because a capture fails if another thread uses CUDA.

ONNX Runtime captures in CUDA's global mode: while a thread captures, calls of any other thread that copy or allocate
are errors, and they end the capture.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from ..arrays import Array

__all__ = ["DEVICE", "Device", "HeldArray", "on_host"]


class HeldArray(Protocol):
    """An array that stays where a session runs: ONNX Runtime's `OrtValue`."""

    def numpy(self) -> Array:
        """A copy on the host; from CUDA, call `on_host`."""
        ...


class Device:
    """Shared by those that use it, and exclusive to one that captures. Either may call `used` again inside."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users, self._captured = 0, False
        self._mine = threading.local()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Use the device, once nobody captures or waits to."""
        if getattr(self._mine, "inside", False):
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._captured)
            self._users += 1
        self._mine.inside = True
        try:
            yield
        finally:
            self._mine.inside = False
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Use the device alone, once nobody else does."""
        with self._changed:
            self._changed.wait_for(lambda: not self._captured)
            # From here on, nobody begins.
            self._captured = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._users)
            self._mine.inside = True
            yield
        finally:
            self._mine.inside = False
            with self._changed:
                self._captured = False
                self._changed.notify_all()


# Of this process.
DEVICE = Device()


def on_host(value: HeldArray) -> Array:
    """A copy on the host."""
    with DEVICE.used():
        return value.numpy()

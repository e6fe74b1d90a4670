"""Runs of a graph whose inputs and outputs stay at their addresses, so that a CUDA graph can replay them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array
from .device import DEVICE, HeldArray

if TYPE_CHECKING:
    from .session import Session

__all__ = ["FixedRun", "FixedRuns"]

# How many unused runs are kept, and how many are made before the session is opened anew: ONNX Runtime keeps what it has
# captured, of which it does not say how much it is, until the session is closed.
_UNUSED, _CAPTURES = 4, 256


class FixedRun:
    """Inputs and outputs of a graph, with room for certain sizes.

    Outputs named `grown_NAME` are written in place of the inputs NAME.

    Attributes:
        sizes: of the graph's symbolic axes.
        values: the inputs and the other outputs, where the session runs; zeros at first.
        inference: ONNX Runtime's session, in which it is captured.
        marker: what the owner knows of their contents; None at first, and after `FixedRuns.give_back`.
    """

    def __init__(self, session: Session, sizes: Mapping[str, int], number: int) -> None:
        self.sizes = sizes
        self.marker: object = None
        # The session may be opened anew meanwhile.
        self._session, self.inference = session, session.inference
        self._options = session.make_stop()
        # Each is captured by itself.
        self._options.add_run_config_entry("gpu_graph_id", str(number))  # type: ignore[attr-defined]
        # ONNX Runtime captures for each thread.
        self._captured = threading.local()
        self._updated: dict[str, Array] = {}
        self.values: dict[str, HeldArray] = {}
        self._binding = self.inference.io_binding()
        for value in [*session.graph.inputs, *session.graph.outputs]:
            name = value.name.removeprefix("grown_")
            if name not in self.values:
                shape = [axis if isinstance(axis, int) else sizes[axis] for axis in value.shape]
                zeros = np.zeros(shape, np.dtype(value.dtype))
                self.values[name] = session.hold({name: zeros})[name]
        for value in session.graph.inputs:
            self._binding.bind_ortvalue_input(value.name, self.values[value.name])
        for value in session.graph.outputs:
            self._binding.bind_ortvalue_output(value.name, self.values[value.name.removeprefix("grown_")])

    def write(self, name: str, array: Array) -> None:
        """Copy an array to an input."""
        value: Any = self.values[name]
        with DEVICE.used():
            value.update_inplace(array)

    def update(self, name: str, array: Array) -> None:
        """Copy an array, which nobody changes later, to an input, unless the last one was equal."""
        before = self._updated.get(name)
        if before is None or not np.array_equal(before, array):
            self.write(name, array)
            self._updated[name] = array

    def __call__(self) -> None:
        """Run the graph."""
        with DEVICE.used() if hasattr(self._captured, "done") else DEVICE.captured(), self._session.fixed_runs.running:
            self.inference.run_with_iobinding(self._binding, self._options)
        self._captured.done = True
        self._session.check_weights()


class FixedRuns:
    """Makes the fixed runs of a session, and keeps some that are not in use, with what was captured of them.

    Safe to share between threads; a fixed run is not.

    Attributes:
        running: held during a run, because CUDA graphs must not be used by two threads at once.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._unused: deque[FixedRun] = deque(maxlen=_UNUSED)
        self._made = 0
        self.running, self._lock = threading.Lock(), threading.Lock()

    def take(self, sizes: Mapping[str, int]) -> FixedRun:
        """A run for these sizes of the graph's symbolic axes, which nobody else uses."""
        with self._lock:
            # Others may be given back meanwhile, behind these.
            for _ in range(len(self._unused)):
                run = self._unused.popleft()
                if run.sizes == sizes:
                    return run
                self._unused.append(run)
            if self._made == _CAPTURES:
                self._session.reopen()
                self._unused.clear()
                self._made = 0
            self._made += 1
            return FixedRun(self._session, sizes, self._made)

    def give_back(self, run: FixedRun) -> None:
        """Let others use a run, unless its session has been opened anew: the run would keep the old one in memory.

        Without a lock, because the garbage collector may end an iterator, which gives back its run, anywhere.
        """
        run.marker = None
        if run.inference is self._session.inference:
            self._unused.append(run)

"""Time several ways of doing the same work in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np


def interleave(ways: dict[str, Callable[[], Any]], repeats: int, pause: float = 0.0) -> dict[str, float]:
    """Return the median seconds of each method, alternating between them.

    A method that returns a float has measured its own time. The pause, in seconds, lets the threads of one library,
    which spin for a while after a call, fall asleep before the next call.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            time.sleep(pause)
            start = time.perf_counter()
            result = way()
            if repeat:
                taken[name].append(result if isinstance(result, float) else time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in taken.items()}

"""Run a coroutine for code that is not async, also where an event loop runs already, as in a notebook."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["wait_for"]

T = TypeVar("T")


@functools.lru_cache(1)
def _loop() -> asyncio.AbstractEventLoop:
    """The one event loop of such calls, in a thread of its own: connections stay open from call to call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="bonnx-async", daemon=True).start()
    return loop


def wait_for(coroutine: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result; an interrupt cancels it."""
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise

"""Run a coroutine for code that is not async, also where an event loop runs already, as in a notebook."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["wait_for"]

T = TypeVar("T")
_LOCK = threading.Lock()
_THREAD = "bonnx-async"


@functools.lru_cache(1)
def _loop() -> asyncio.AbstractEventLoop:
    """The one event loop of such calls, in a thread of its own: connections stay open from call to call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=_THREAD, daemon=True).start()
    return loop


def _start_anew() -> None:
    """In the child of a fork: threads do not survive it, and the loop's is gone."""
    _loop.cache_clear()
    _LOCK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_start_anew)


def wait_for(coroutine: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result; an interrupt cancels it.

    Raises:
        RuntimeError: the caller is itself run by such a call, which would wait for itself.
    """
    if threading.current_thread().name == _THREAD:
        coroutine.close()
        raise RuntimeError("this function would wait for itself; await its async form, such as `arun`, here")
    with _LOCK:
        loop = _loop()
    future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    try:
        # Without a timeout, Ctrl-C would not end this wait on Windows.
        while not concurrent.futures.wait([future], 0.2).done:
            pass
        return future.result()
    except BaseException:
        future.cancel()
        raise

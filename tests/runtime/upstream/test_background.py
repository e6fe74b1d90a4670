"""Coroutines that are run for code that is not async."""

import asyncio
import os
import signal

import pytest

from bonnx.runtime.upstream.background import wait_for


def test_waiting_for_itself_is_an_error():
    async def inner():
        wait_for(asyncio.sleep(0))

    with pytest.raises(RuntimeError, match="would wait for itself"):
        wait_for(inner())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_loop_after_a_fork():
    wait_for(asyncio.sleep(0))
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        wait_for(asyncio.sleep(0))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

"""Sample from an upstream, and look at what arrived."""

import asyncio
import time

from bonnx.runtime.upstream.client import Upstream
from bonnx.runtime.upstream.completion import Completion, Failure

CHAT = {"messages": [{"role": "user", "content": "What is 6 * 7?"}]}


def collect(url, body, n, *, seconds=None, cost=None, **settings):
    """What arrives, in the order in which it does."""

    async def run():
        until = None if seconds is None else time.monotonic() + seconds
        async with Upstream(url, "m", **settings) as upstream:
            return [arrival async for arrival in upstream.sample(body, n, until=until, cost=cost)]

    return asyncio.run(run())


def texts(arrivals):
    return sorted(arrival.text for arrival in arrivals if isinstance(arrival, Completion))


def failures(arrivals):
    return [arrival.reason for arrival in arrivals if isinstance(arrival, Failure)]

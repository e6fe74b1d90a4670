"""Search by steps over a server: a step is a completion that stops at the step text, and the next request continues it.

The methods of `bonnx.runtime.search` are plain functions. They run in a thread of their own and wait there for the
requests, which run in the event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Coroutine, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from bonnx.errors import InputError

from ..arrays import Array
from ..checks import shown
from ..engine.engine import Engine
from ..generate.growing import DEADLINE, LENGTH, STOP
from ..search.method import Method
from ..search.methods import METHODS
from ..search.tree import Branch, Tree
from ..upstream.completion import Completion, Failure
from ..upstream.cost import SamplingCost
from .result import BestOfNResult
from .run import Arrivals, Run, Score, score_some

__all__ = ["SampleSteps", "UpstreamTree", "check_for_completions", "check_step", "search_by_steps", "step_of"]

T = TypeVar("T")
# Seconds before the deadline in which a failure counts as the deadline's.
_LATE = 0.05


class SampleSteps(Protocol):
    """Samples the next steps of a completion."""

    def __call__(self, text: str, n: int, first: int, step: str | None, cost: SamplingCost, **how: Any) -> Arrivals:
        """Sample.

        Args:
            text: of the completion so far.
            n: number of next steps, each of another completion.
            first: how many were sampled before, of any completion.
            step: the text at which to stop; None to go on to the end.
            cost: what to add the cost to.
            **how: `written` and `greedy` of `continued`.
        """
        ...


@dataclass(eq=False)
class UpstreamBranch(Branch):
    """A completion under way.

    Attributes:
        text: so far, the ends of its steps included.
        length: number of tokens so far; where several shared a request, by their mean.
        is_assumed: the server did not say why the last step ended; perhaps the completion did.
        completion: once it has ended.
        failure: why it was broken off.
        score: the last one.
    """

    text: str = ""
    length: int = 0
    is_assumed: bool = False
    completion: Completion | None = None
    failure: Failure | None = None
    score: float = np.nan

    @property
    def written(self) -> Hashable:
        return self.text


class UpstreamTree(Tree[UpstreamBranch]):
    """The completions of one prompt, which a server writes step by step. Made in the event loop, used in a thread.

    Args:
        run: takes the completions and the failures.
        sample: asks the server.
        score: ranks completions that are not finished.
        step: the text that ends a step.
        until: deadline on the clock of `time.monotonic`.
    """

    def __init__(self, run: Run, sample: SampleSteps, score: Score, step: str, until: float | None) -> None:
        self.run, self.unfinished = run, list[UpstreamBranch]()
        self._sample, self._score, self._step, self._until = sample, score, step, until
        self._loop, self._asked = asyncio.get_running_loop(), 0
        self._lock, self._waiting, self._stopped = threading.Lock(), None, False
        # Scores of texts that are not finished.
        self._known: dict[str, float] = {}

    _waiting: concurrent.futures.Future[Any] | None

    def stop(self) -> None:
        """Cancel the open requests and end the search."""
        with self._lock:
            self._stopped = True
            if self._waiting is not None:
                self._waiting.cancel()

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the event loop.

        Raises:
            CancelledError: the search was stopped.
        """
        with self._lock:
            if self._stopped:
                coroutine.close()
                raise concurrent.futures.CancelledError
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._waiting = future
        return future.result()

    def roots(self, count: int) -> list[UpstreamBranch]:
        return [UpstreamBranch() for _ in range(count)]

    def fork(self, branch: UpstreamBranch, count: int) -> list[UpstreamBranch]:
        first = [branch] if count else []
        return [*first, *(dataclasses.replace(branch) for _ in range(count - 1))]

    def look_ahead(self, branches: Sequence[UpstreamBranch], steps: int) -> list[UpstreamBranch]:
        grown = [dataclasses.replace(branch) for branch in branches]
        for _ in range(steps):
            if going := [branch for branch in grown if branch.reason < 0]:
                self._wait(self._grow(going, self._step, greedy=True))
        # What lies ahead is judged as it stands, and is no candidate.
        return [dataclasses.replace(branch, completion=None, failure=None) for branch in grown]

    def grow(self, branches: Sequence[UpstreamBranch], *, whole: bool = False, up_to: int | None = None) -> None:
        self._wait(self._grow(branches, None if whole else self._step))
        for branch in branches:
            if branch.failure is not None:
                self.run.failures.append(branch.failure)
                is_late = self._until is not None and time.monotonic() > self._until - _LATE
                self.unfinished += [branch] if is_late and branch.text else []

    def rate(self, branches: Sequence[UpstreamBranch]) -> Array:
        return self._wait(self._rate(branches))

    def judge(self, branches: Sequence[UpstreamBranch]) -> Array:
        new = [branch for branch in branches if np.isnan(branch.score)]
        self.rate(new)
        return np.array([branch.score for branch in branches], np.float32)

    def note(
        self,
        branch: UpstreamBranch,
        score: float,
        round_: int,
        fate: str,
        lookahead: UpstreamBranch | None = None,
    ) -> None:
        """The steps are not kept."""

    async def _grow(self, branches: Sequence[UpstreamBranch], step: str | None, *, greedy: bool = False) -> None:
        """All at once; branches with the same text share a request."""
        forks: dict[str, list[UpstreamBranch]] = {}
        for branch in branches:
            forks.setdefault(branch.text, []).append(branch)
        tasks = [asyncio.ensure_future(self._extend(members, step, greedy=greedy)) for members in forks.values()]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _extend(self, members: list[UpstreamBranch], step: str | None, *, greedy: bool) -> None:
        # The most likely tokens are the same for all, and some servers refuse to give them several times.
        count = 1 if greedy else len(members)
        first, self._asked = self._asked, self._asked + count
        left, has_ended = [*members], False
        cost, text, written = SamplingCost(), members[0].text, max(branch.length for branch in members)
        try:
            arrivals = self._sample(text, count, first, step, cost, written=written, greedy=greedy)
            async with contextlib.aclosing(arrivals):
                async for arrival in arrivals:
                    for branch in [*left] if greedy else left[:1]:
                        left.remove(branch)
                        _extend_one(branch, arrival, step)
                        if branch.completion is not None and text and not _text(arrival):
                            branch.void, has_ended = has_ended, True
        finally:
            self.run.cost.include(cost)
        for branch in left:
            _extend_one(branch, Failure("no completion came"), step)
        for branch in members:
            branch.length = written + math.ceil((cost.completion_tokens or 0) / count)

    async def _rate(self, branches: Sequence[UpstreamBranch]) -> Array:
        """Score what is new; a branch that failed keeps its last score."""
        ended = [branch for branch in branches if branch.completion is not None and not branch.void]
        longest = self.run.longest
        texts = [b.text for b in branches if b.completion is None and b.failure is None and b.text]
        going = dict.fromkeys(text for text in texts if longest is None or len(text) <= longest)
        if new := dict(enumerate(text for text in going if text not in self._known)):
            self._known |= dict.fromkeys(new.values(), np.nan)
            # Why a text has no score is not reported: only completions are.
            for numbers, ranking in await score_some(self._score, new, {}):
                scores = ranking.candidate_scores.tolist()
                self._known |= {new[i]: score for i, score in zip(numbers, scores, strict=True)}
        for branch in branches:
            if branch.completion is None and branch.failure is None:
                branch.score = self._known.get(branch.text, np.nan)
        scored = await self.run.take([branch.completion for branch in ended if branch.completion is not None])
        for branch, score in zip(ended, scored.tolist(), strict=True):
            branch.score = score
        return np.array([branch.score for branch in branches], np.float32)


def _text(arrival: Completion | Failure) -> str:
    """What a step adds."""
    return "" if isinstance(arrival, Failure) else arrival.text


def _extend_one(branch: UpstreamBranch, arrival: Completion | Failure, step: str | None) -> None:
    """Add a step to a branch, which may end it."""
    if isinstance(arrival, Failure):
        branch.failure, branch.reason = arrival, DEADLINE
        return
    if step is not None and _ends_step(branch, arrival, step):
        branch.text += arrival.text.removesuffix(step) + step
        branch.is_assumed = arrival.stopped_by is None and not arrival.text.endswith(step)
        return
    if branch.is_assumed and not arrival.text and step is not None:
        # The completion had ended before the step text that was assumed.
        branch.text = branch.text.removesuffix(step)
    branch.text += arrival.text
    message = None if arrival.message is None else {**arrival.message, "content": branch.text}
    branch.completion = dataclasses.replace(arrival, text=branch.text, message=message)
    branch.reason = LENGTH if arrival.finish_reason == "length" else STOP


def _ends_step(branch: UpstreamBranch, arrival: Completion, step: str) -> bool:
    """Whether a step ended here, and not the whole completion."""
    if arrival.finish_reason not in ("stop", None) or (arrival.message or {}).get("tool_calls"):
        return False
    if arrival.text.endswith(step):
        return True
    if arrival.stopped_by is not None:
        return arrival.stopped_by == step
    # The server does not say. A completion that had ended goes on with nothing.
    return bool(arrival.text)


def check_for_completions(name: str, method: Method) -> None:
    """Refuse a method that cannot work with the completions of another program.

    Raises:
        InputError: says why.
    """
    if method.needs_artifact:
        raise InputError(
            f"method: '{name}' works only with an artifact that generates, because {method.needs_artifact}; expected "
            f"one of {', '.join(name for name, (kind, _) in METHODS.items() if not kind.needs_artifact)}"
        )


def step_of(engine: Engine) -> str | None:
    """The text that ends a step for an artifact's scorer; None if it does not say."""
    tokenizer = engine.reader.tokenizer
    return None if tokenizer is None else tokenizer.step_text


def check_step(method: str, step: object) -> str:
    """The text that ends a step.

    Raises:
        InputError: it is not a text, or None: neither the caller nor the scorer says what ends a step.
    """
    if step is None:
        raise InputError(
            f"step: the scorer does not say what ends a step; '{method}' needs the text that does, such as a blank line"
        )
    if not isinstance(step, str) or not step:
        raise InputError(f"step: expected the text that ends a step; got {shown(step)}")
    return step


async def search_by_steps(tree: UpstreamTree, method: Method, name: str, n: int) -> BestOfNResult:
    """Spend a budget of `n` completions by a method that searches by steps, and choose.

    Where no completion has ended at the deadline, the choice is made from the unfinished ones.

    Raises:
        UpstreamError: none came.
        NoWinnerError: no completion can win.
        InputError: the budget is less than the method needs, or the scorer cannot read the prompt or a completion.
    """
    # A thread of its own: the pool that others share could fill up with searches that wait for it.
    executor = ThreadPoolExecutor(1, "bonnx-search")
    # A ranking that comes first waits for the prompt by itself.
    reading = asyncio.ensure_future(tree.run.read_prompt())
    try:
        await asyncio.get_running_loop().run_in_executor(executor, method.run, tree, n)
    finally:
        tree.stop()
        executor.shutdown(wait=False)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    if not tree.run.completions:
        texts = dict.fromkeys(branch.text for branch in tree.unfinished)
        await tree.run.take([Completion(text, None, "deadline") for text in texts])
    return tree.run.choose(name)

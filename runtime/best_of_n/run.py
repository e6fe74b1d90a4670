"""Sample, score each completion when it comes, stop when enough have come, and choose."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from bonnx.errors import InputError, NoWinnerError, UpstreamError

from ..arrays import Array
from ..artifact.manifest import Scoring
from ..batching import TooLargeError
from ..rank.join import join_rankings
from ..rank.result import Ranking
from ..search.sampling import Adaptive
from ..selection.tool_calls import reads_tools
from ..selection.vote import Answers, Ballot, make_ballot
from ..text.reader import Item, NoneReadableError
from ..text.tokenizer import NO_TOKENS
from ..upstream.completion import Completion, Failure
from ..upstream.cost import SamplingCost
from .result import BestOfNResult

__all__ = ["Arrivals", "Run", "Score", "score_some"]

# Ranks some candidates of the prompt by their scores.
Score: TypeAlias = Callable[[Sequence[Item]], Awaitable[Ranking]]
Arrivals: TypeAlias = AsyncGenerator[Completion | Failure, None]
# Errors of some completions that others need not share: too many tokens, or no time left to score them.
_REFUSALS = (TooLargeError, asyncio.TimeoutError)


@dataclass
class Run:
    """Best-of-N of one prompt.

    Attributes:
        sample: gives so many completions; it is told how many were sampled before.
        score: ranks some of them.
        vote: as in `Model.rank`.
        answers: likewise; how to find an answer, since there are no candidates yet.
        scoring: of the artifact that scores; None for scores that are weights as they are.
        cost: what `sample` notes the cost in.
        longest: maximum number of characters of a text that the scorer can read; None if there is none.
        prepare: computes the prompt while the first completions are under way.
    """

    sample: Callable[[int, int], Arrivals]
    score: Score
    vote: str = "score"
    answers: Answers | None = None
    scoring: Scoring | None = None
    cost: SamplingCost = field(default_factory=SamplingCost)
    longest: int | None = None
    prepare: Callable[[], Awaitable[object]] | None = None
    start: float = field(default_factory=time.monotonic)
    saved: int = 0
    completions: list[Completion] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    _unscored: dict[int, Exception] = field(default_factory=dict)
    _parts: list[tuple[Sequence[int], Ranking]] = field(default_factory=list)

    async def all_at_once(self, n: int, method: str = "best_of_n") -> BestOfNResult:
        """Sample `n` completions and choose; `method` is what the result calls it.

        Raises:
            UpstreamError: none came.
            NoWinnerError: no completion can win.
            InputError: the scorer cannot read the prompt or a completion.
        """
        await self._sample(n)
        return self.choose(method)

    async def adaptively(self, n: int, rule: Adaptive) -> BestOfNResult:
        """Sample at most `n` completions, in batches, until the rule says that there are enough.

        Raises:
            UpstreamError: none came.
            NoWinnerError: no completion can win.
            InputError: the scorer cannot read the prompt or a completion.
        """
        while (asked := len(self.completions) + len(self.failures)) < n:
            failed = len(self.failures)
            await self._sample(min(rule.batch, n - asked))
            if len(self.failures) == failed + min(rule.batch, n - asked):
                # Nothing came of a whole batch: the rest would fare no better.
                break
            voted = None if self.vote == "score" else self._ballot().answers
            if rule.is_enough(self._scores, voted):
                self.saved = n - len(self.completions) - len(self.failures)
                break
        return self.choose("adaptive")

    async def take(self, completions: Sequence[Completion]) -> Array:
        """Add completions that were sampled elsewhere: their scores (n,) float32, NaN for those that cannot win.

        Raises:
            InputError: the scorer cannot read the prompt or a completion.
        """
        first = len(self.completions)
        self.completions += completions
        if present := [i for i in range(first, len(self.completions)) if self._can_win(i)]:
            await self._score(present)
        return self._scores()[first:]

    async def read_prompt(self) -> None:
        """Let the scorer compute the prompt, once."""
        if self.prepare is not None:
            prepare, self.prepare = self.prepare, None
            # What is wrong with the prompt, the first ranking says in its own words.
            with contextlib.suppress(InputError):
                await prepare()

    async def _sample(self, n: int) -> None:
        """Sample, and score while other completions are still under way; the first error ends both."""
        waiting: asyncio.Queue[int | None] = asyncio.Queue()
        both = [
            asyncio.ensure_future(self._score_as_they_come(waiting)),
            asyncio.ensure_future(self._take_in(n, waiting)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
            for task in both:
                if task.done():
                    task.result()
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _take_in(self, n: int, waiting: asyncio.Queue[int | None]) -> None:
        """Note what comes, and hand it on; None when all have come."""
        async with contextlib.aclosing(self.sample(n, len(self.completions) + len(self.failures))) as arrivals:
            async for arrival in arrivals:
                if isinstance(arrival, Failure):
                    self.failures.append(arrival)
                else:
                    self.completions.append(arrival)
                    waiting.put_nowait(len(self.completions) - 1)
        waiting.put_nowait(None)

    async def _score_as_they_come(self, waiting: asyncio.Queue[int | None]) -> None:
        """Score what has come, then what came meanwhile, until None comes."""
        await self.read_prompt()
        more = True
        while more:
            numbers = [await waiting.get()]
            while not waiting.empty():
                numbers.append(waiting.get_nowait())
            more = None not in numbers
            if present := [number for number in numbers if number is not None and self._can_win(number)]:
                await self._score(present)

    def _can_win(self, number: int) -> bool:
        """Whether a completion needs a scorer: one that is empty or too long cannot win."""
        item = self.completions[number].item
        return bool(item) and not (self.longest is not None and isinstance(item, str) and len(item) > self.longest)

    async def _score(self, numbers: Sequence[int]) -> None:
        self._parts += await score_some(self.score, {i: self.completions[i].item for i in numbers}, self._unscored)

    def _ballot(self) -> Ballot:
        # A completion that calls a tool has no answer in words.
        in_words = isinstance(self.answers, str) and not reads_tools(self.answers)
        items = [completion.text if in_words else completion.item for completion in self.completions]
        silent = [i for i, item in enumerate(items) if not item]
        return make_ballot(self.vote, self.answers, items, "completions", silent, self.scoring)

    def _scores(self) -> Array:
        scores = np.full(len(self.completions), np.nan, np.float32)
        for numbers, ranking in self._parts:
            scores[[*numbers]] = ranking.candidate_scores
        return scores

    def _reasons(self, ranking: Ranking) -> dict[int, str]:
        """Why some completions have no score."""
        reasons = dict(ranking.unreadable)
        for number, score in enumerate(ranking.candidate_scores):
            if math.isnan(score) and number not in reasons:
                reasons[number] = self._reason(number)
        return reasons

    def _reason(self, number: int) -> str:
        """Why a completion has no score, if its ranking does not say."""
        error = self._unscored.get(number)
        if error is not None:
            return str(error) or "there was no time left to score it"
        if not self._can_win(number):
            return "it is too long for the scorer" if self.completions[number].item else NO_TOKENS
        return "its score is NaN"

    def choose(self, method: str) -> BestOfNResult:
        """The choice from what has come; `method` is the name of what sampled it.

        Raises:
            UpstreamError: nothing has.
            NoWinnerError: no completion can win.
        """
        if not self.completions:
            reasons = dict.fromkeys(failure.reason for failure in self.failures)
            statuses = {failure.status for failure in self.failures}
            raise UpstreamError(
                f"none of {len(self.failures)} completions came: {'; '.join([*reasons][:3])}",
                statuses.pop() if len(statuses) == 1 else None,
            )
        if not self._parts:
            for error in self._unscored.values():
                if isinstance(error, _REFUSALS):
                    raise error
            unscored = [*dict.fromkeys(map(self._reason, range(len(self.completions))))]
            raise NoWinnerError(
                f"none of the {len(self.completions)} completions can win, because none has a score: "
                + "; ".join(unscored[:3])
            )
        items = [completion.item for completion in self.completions]
        ranking = join_rankings(self._parts, items, self._ballot())
        ranking = replace(ranking, unreadable=self._reasons(ranking))
        return BestOfNResult(
            ranking.best_index,
            self.completions,
            ranking,
            self.failures,
            method,
            time.monotonic() - self.start,
            self.cost.prompt_tokens,
            self.cost.completion_tokens,
            self.cost.requests,
            self.saved,
        )


async def score_some(
    score: Score, items: Mapping[int, Item], unscored: dict[int, Exception] | None = None
) -> list[tuple[Sequence[int], Ranking]]:
    """Rank candidates by their numbers, in as many parts as their size takes; those without a score are in none.

    Args:
        score: ranks some of them.
        items: the candidates.
        unscored: gets the reason for each that is in no part. Without it an error that others need not share is
            raised.

    Raises:
        InputError: the scorer cannot read the prompt or a candidate.
        TimeoutError: there was no time left to score.
    """
    unscored, is_strict = ({}, True) if unscored is None else (unscored, False)
    numbers = [*items]
    try:
        return [(numbers, await score([*items.values()]))]
    except NoneReadableError as e:
        # Others may have a score.
        unscored.update({numbers[place]: InputError(reason) for place, reason in e.reasons.items()})
        return []
    except (NoWinnerError, *_REFUSALS) as e:
        if isinstance(e, _REFUSALS) and is_strict and (len(items) == 1 or not isinstance(e, TooLargeError)):
            raise
        if not isinstance(e, TooLargeError) or len(items) == 1:
            unscored.update(dict.fromkeys(numbers, e))
            return []
        half = len(numbers) // 2
        parts = []
        for some in (numbers[:half], numbers[half:]):
            parts += await score_some(score, {i: items[i] for i in some}, None if is_strict else unscored)
        return parts

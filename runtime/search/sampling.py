"""Completions side by side: best-of-N, its votes, self-certainty, and adaptive sampling."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from msgspec import Meta

from bonnx.errors import InputError

from ..arrays import Array
from .method import Finalists, Method
from .tree import B, Tree

__all__ = ["Adaptive", "Sampling", "SelfCertainty", "borda", "leader_is_safe", "worth_one_more"]


@dataclass(frozen=True)
class Sampling(Method):
    """As many independent completions as the budget allows."""

    continues_probe: ClassVar[bool] = True

    def run(self, tree: Tree[B], budget: int, begun: Sequence[B] = ()) -> list[B]:
        """The finished branches, including those that are finished already."""
        fresh = tree.roots(max(0, budget - len(begun)))
        tree.grow(fresh, whole=True)
        return [*begun, *fresh]


@dataclass(frozen=True)
class SelfCertainty(Sampling):
    """Best-of-N without a scorer: candidates vote, and those of which the model was more certain count more."""

    # Larger powers would overflow float32 with thousands of candidates.
    power: Annotated[float, Meta(ge=0, le=8, description="exponent of a candidate's points; 0 is majority")] = 0.5

    needs_certainty: ClassVar[bool] = True
    needs_artifact: ClassVar[str] = "it reads the probability of every token of the vocabulary"

    def choose(self, finalists: Finalists) -> tuple[int, Array]:
        """By `borda`."""
        certainties = np.array([np.mean(branch.certainties) for branch in finalists.branches])
        return borda(certainties, finalists.answer_ids, self.power)


@dataclass(frozen=True)
class Adaptive(Method):
    """Completions in batches, until one more is not worth its price; the budget is the maximum.

    Without a vote sampling is opening boxes (Weitzman, 1979; for best-of-N arXiv 2510.01394): it stops when the
    expected gain of another is below its price. After m completions the next is the best of all with probability
    1 / (m + 1), for any distribution of scores, and cannot exceed `ceiling`.

    With a vote it stops when the leading answer will most likely stay ahead of the second (Aggarwal et al., 2023,
    Adaptive-Consistency).
    """

    continues_probe: ClassVar[bool] = True

    batch: Annotated[int, Meta(ge=1, description="completions at a time")] = 4
    price: Annotated[float, Meta(gt=0, description="of one completion, in units of the score")] = 0.01
    ceiling: Annotated[float, Meta(description="the maximum score; 1 for probabilities")] = 1.0
    confidence: Annotated[
        float, Meta(ge=0.5, lt=1, description="probability that the leading answer stays ahead of the second")
    ] = 0.95
    rule: Annotated[
        Literal["auto", "gain", "leader"],
        Meta(description="what ends the sampling: the expected gain, the leader's lead, or the one for the vote"),
    ] = "auto"

    def run(self, tree: Tree[B], budget: int, begun: Sequence[B] = ()) -> list[B]:
        """The finished branches: the first ones of `Sampling`, including those that are finished already."""
        if self.rule == "leader" and tree.answer_of is None:
            raise InputError("rule: 'leader' needs a vote; pass answers, and vote='weighted' or 'majority'")
        done, rest = list(begun), tree.roots(max(0, budget - len(begun)))
        while rest and not (done and self._is_enough(tree, done)):
            batch, rest = rest[: self.batch], rest[self.batch :]
            tree.grow(batch, whole=True)
            done += batch
        return done

    def _is_enough(self, tree: Tree[B], done: Sequence[B]) -> bool:
        answers = None if tree.answer_of is None else [tree.answer_of(branch) for branch in done]
        return self.is_enough(lambda: tree.judge(done), answers)

    def is_enough(self, scores: Callable[[], Array], answers: Sequence[Hashable | None] | None) -> bool:
        """Whether one more completion is not worth its price.

        Args:
            scores: gives those of the completions so far, (n,) float32; called only if the rule reads them.
            answers: what they vote for; None without a vote.
        """
        if answers is not None and self.rule != "gain":
            return leader_is_safe(answers, self.confidence)
        known = scores()
        best = -math.inf if np.isnan(known).all() else float(np.nanmax(known))
        return not worth_one_more(best, len(known), self.ceiling, self.price)


def worth_one_more(best: float, count: int, ceiling: float, price: float) -> bool:
    """Whether one more completion may gain its price, after `count` of which the best has the score `best`."""
    return (ceiling - best) / (count + 1) > price


def leader_is_safe(answers: Sequence[Hashable | None], confidence: float) -> bool:
    """Whether the most frequent answer stays ahead of the second with this probability.

    Under a uniform prior on the share of the first among these two it is P(share > 1/2), a sum of binomials.
    """
    counts = [count for _, count in Counter(answer for answer in answers if answer is not None).most_common(2)]
    first, second = [*counts, 0, 0][:2]
    total = first + second + 1
    ahead = sum(math.comb(total, k) for k in range(second + 1, total + 1))
    return bool(ahead >= confidence * 2**total)


def borda(certainties: Array, ids: Array, power: float) -> tuple[int, Array]:
    """The winner of Borda voting by self-certainty (Kang et al., 2025).

    The candidate of rank r among n gives (n - r + 1)^power points to its answer; power 0 is majority. If none has an
    answer each stands for itself.

    Args:
        certainties: (n,).
        ids: answers as integers (n,), below 0 for none.
        power: p.

    Returns:
        the most certain candidate of the answer with most points, and each candidate's points (n,) float32, NaN for
        one without an answer.
    """
    count = len(certainties)
    place = np.empty(count)
    place[np.argsort(-certainties, kind="stable")] = np.arange(count)
    points = (count - place) ** power
    groups = points
    if (ids >= 0).any():
        groups = np.array([points[ids == answer].sum() if answer >= 0 else np.nan for answer in ids])
    leading = np.flatnonzero(groups == np.nanmax(groups))
    return int(leading[np.argmax(certainties[leading])]), groups.astype(np.float32)

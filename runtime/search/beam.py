"""Search by steps against the scorer: beam search, lookahead search and diverse verifier tree search."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from msgspec import Meta

from bonnx.errors import InputError

from ..arrays import Array
from ..generate.growing import STOP
from .count import Count, as_count
from .method import Method
from .tree import B, Branch, Tree

__all__ = ["Beam", "DiverseTrees", "Lookahead"]


@dataclass(frozen=True)
class Beam(Method):
    """Beam search (Snell et al., 2024, section 5): N first steps; the best N / M are kept, with M next steps each.

    Completions that end leave the beam as candidates and the beam shrinks, so that there are N candidates in the end.
    After `rounds` rounds the remaining branches grow to their ends.
    """

    needs_scorer: ClassVar[bool] = True

    width: Annotated[
        Count, Meta(ge=1, description="next steps of each branch that is kept, M; 'sqrt' is the square root of N")
    ] = 4
    rounds: Annotated[int, Meta(ge=1, description="maximum number of rounds of branching")] = 40
    # Short steps are often the same, and would soon fill the beam.
    distinct: Annotated[
        bool, Meta(description="of branches with the same text keep only the first, as long as there are others")
    ] = True

    def run(self, tree: Tree[B], budget: int, begun: Sequence[B] = ()) -> list[B]:
        """The finished branches."""
        return self._search(tree, [budget], self._width(budget))

    def _width(self, beams: int, price: int = 1) -> int:
        """The width for so many beams, each of which costs `price` completions."""
        width = as_count(self.width, beams)
        if beams < width:
            raise InputError(
                f"a width of {width} needs at least {width} beams, a budget of {width * price} completions; "
                f"got {beams * price}"
            )
        return width

    def _search(self, tree: Tree[B], sizes: Sequence[int], width: int, steps: int = 0) -> list[B]:
        """Beam search in independent groups of these sizes."""
        active = tree.roots(sum(sizes))
        groups = [group for group, size in enumerate(sizes) for _ in range(size)]
        for branch, group in zip(active, groups, strict=True):
            branch.group = group
        left, done = list(sizes), list[B]()
        for round_ in range(self.rounds + 1):
            tree.grow(active, whole=round_ == self.rounds)
            values, beyond = _values(tree, active, steps)
            kept: dict[int, list[int]] = {}
            for group in sorted({branch.group for branch in active}):
                members = [i for i, branch in enumerate(active) if branch.group == group]
                going = [i for i in members if active[i].reason < 0]
                left[group] -= sum(active[i].reason >= 0 and not active[i].void for i in members)
                again = _repeated(active, going) if self.distinct else set()
                # Those without a score come last.
                going.sort(key=lambda i: (i in again, -values[i] if not math.isnan(values[i]) else math.inf))
                kept[group] = going[: math.ceil(left[group] / width)]
            for i, branch in enumerate(active):
                ended = "finished" if branch.reason == STOP else "cut"
                fate = ended if branch.reason >= 0 else "kept" if i in kept[branch.group] else "dropped"
                tree.note(branch, float(values[i]), round_, fate, beyond.get(i))
                done += [branch] if branch.reason >= 0 and not branch.void else []
            active = [
                branch
                for group, going in kept.items()
                for place, i in enumerate(going)
                # As evenly as possible; the first ones get more.
                for branch in tree.fork(active[i], left[group] // len(going) + (place < left[group] % len(going)))
            ]
            if not active:
                break
        return done


@dataclass(frozen=True)
class Lookahead(Beam):
    """Beam search that judges a branch `steps` greedy steps ahead (Snell et al., 2024).

    It costs about N (steps + 1) completions; the budget counts these, so there are budget / (steps + 1) beams.
    """

    steps: Annotated[int, Meta(ge=1, description="greedy steps to look ahead; 3 in the paper")] = 3

    def run(self, tree: Tree[B], budget: int, begun: Sequence[B] = ()) -> list[B]:
        """The finished branches."""
        beams = budget // (self.steps + 1)
        if beams < 1:
            raise InputError(f"a budget of {budget} is less than one beam that looks {self.steps} steps ahead")
        return self._search(tree, [beams], self._width(beams, self.steps + 1), self.steps)


@dataclass(frozen=True)
class DiverseTrees(Beam):
    """Diverse verifier tree search (Beeching et al., 2024): N / M independent beam searches of M beams."""

    def run(self, tree: Tree[B], budget: int, begun: Sequence[B] = ()) -> list[B]:
        """The finished branches."""
        width = self._width(budget)
        count = budget // width
        sizes = [budget // count + (i < budget % count) for i in range(count)]
        return self._search(tree, sizes, width)


def _repeated(active: Sequence[Branch], members: Sequence[int]) -> set[int]:
    """The branches that say what an earlier one says."""
    seen, repeated = set[Hashable](), set[int]()
    for i in members:
        written = active[i].written
        repeated |= {i} if written in seen else set()
        seen.add(written)
    return repeated


def _values(tree: Tree[B], active: Sequence[B], steps: int) -> tuple[Array, dict[int, B]]:
    """The score of each branch, and the lookahead of those that have one."""
    if not steps:
        return tree.rate(active), {}
    going = [i for i, branch in enumerate(active) if branch.reason < 0]
    seen = dict(zip(going, tree.look_ahead([active[i] for i in going], steps), strict=True))
    return tree.rate([seen.get(i, branch) for i, branch in enumerate(active)]), seen

"""Completions side by side, the weaker ones given up on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..steps import PRUNED
from .tree import Branch, Tree

__all__ = ["Pruned"]


@dataclass(frozen=True)
class Pruned:
    """Speculative rejection (Sun et al., 2024) by the running score: `prune_every` and `prune_keep` of `generate`.

    Attributes:
        every: tokens between two prunings.
        keep: the share that goes on, rounded up.
    """

    every: int = 12
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise InputError(f"every: expected a whole number of at least 1; got {self.every!r}")
        if not 0 < self.keep <= 1:
            raise InputError(f"keep: expected above 0 and at most 1; got {self.keep!r}")

    def run(self, tree: Tree, budget: int) -> list[Branch]:
        """All branches, those that were pruned among them."""
        branches = tree.roots(budget)
        race, length = list(branches), 0
        while growing := [branch for branch in race if branch.reason < 0]:
            length += self.every
            tree.grow(growing, whole=True, up_to=length)
            if any(branch.reason < 0 and len(branch.tokens) == length for branch in race):
                ranked = np.nan_to_num(tree.rate(race), nan=-np.inf)
                order = np.argsort(-ranked, kind="stable")[: max(1, math.ceil(len(race) * self.keep - 1e-4))]
                kept = sorted(order.tolist())
                for i in set(range(len(race))) - set(kept):
                    if race[i].reason < 0:
                        race[i].reason = PRUNED
                race = [race[i] for i in kept]
        return branches

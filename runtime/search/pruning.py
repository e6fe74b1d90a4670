"""Completions side by side, of which the weaker ones are dropped on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta

from ..generate.growing import PRUNED, survivors
from .method import Method
from .tree import B, Tree

__all__ = ["Pruned"]


@dataclass(frozen=True)
class Pruned(Method):
    """Speculative rejection (Sun et al., 2024) by the running score: `prune_every` and `prune_keep` of `generate`."""

    needs_artifact: ClassVar[str] = "it scores completions after every few tokens and ends some of them there"

    every: Annotated[int, Meta(ge=1, description="tokens between two prunings")] = 12
    keep: Annotated[float, Meta(gt=0, le=1, description="the share that is kept, rounded up")] = 0.5

    def run(self, tree: Tree[B], budget: int, begun: Sequence[B] = ()) -> list[B]:
        """All branches, including the pruned ones."""
        branches, length = tree.roots(budget), 0
        race = np.ones(budget, bool)
        while growing := [branch for branch in branches if branch.reason < 0]:
            length += self.every
            tree.grow(growing, whole=True, up_to=length)
            if any(branch.reason < 0 for branch in growing):
                scores = np.full(budget, np.nan, np.float32)
                scores[race] = tree.rate([branch for branch, kept in zip(branches, race, strict=True) if kept])
                race = survivors(scores, race, self.keep)
                for branch, kept in zip(branches, race, strict=True):
                    if branch.reason < 0 and not kept:
                        branch.reason = PRUNED
        return branches

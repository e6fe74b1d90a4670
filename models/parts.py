"""How parameters are made of a checkpoint's tensors where the two are not the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Part", "groups", "halves", "plus", "rows", "times"]

Change = Callable[[Tensor], Tensor]


@dataclass
class Part:
    """How a parameter is made of a stored tensor.

    Attributes:
        shape: of the stored tensor; None if it is the parameter's.
        changes: from the stored tensor to the parameter, in order; each takes and returns float32.
    """

    shape: tuple[int, ...] | None = None
    changes: list[Change] = field(default_factory=list)

    def __call__(self, stored: Tensor) -> Tensor:
        """Make the parameter."""
        for change in self.changes:
            stored = change(stored)
        return stored


def rows(start: int, count: int) -> Change:
    """Take `count` rows of a fused tensor, from `start` on."""
    # A copy, so that the rest of the fused tensor is not kept in memory.
    return lambda stored: stored[start : start + count].clone()


def groups(kv_heads: int, group: int, start: int, count: int, size: int) -> Change:
    """Take `count` heads from each group of InternLM2's `wqkv`: the queries of a kv head, its key and its value."""

    def take(stored: Tensor) -> Tensor:
        heads: Tensor = stored.reshape(kv_heads, group, size, -1)[:, start : start + count]
        return heads.reshape(kv_heads * count * size, *stored.shape[1:]).clone()

    return take


def plus(offset: float) -> Change:
    """Add a constant, as norms do whose weights are stored as their distance from 1."""
    return lambda stored: stored + offset


def times(factor: float) -> Change:
    """Multiply by a constant that the config has outside of the weights."""
    return lambda stored: stored * factor


def halves(size: int, rotated: int) -> Change:
    """Reorder the rows of heads that rotate adjacent features, so that they rotate the halves of the rotated ones.

    Both the queries and the keys are reordered, so their products stay the same.
    """

    def reorder(stored: Tensor) -> Tensor:
        heads = stored.reshape(-1, size, *stored.shape[1:]).clone()
        pairs = heads[:, :rotated].reshape(len(heads), rotated // 2, 2, *stored.shape[1:])
        heads[:, :rotated] = pairs.transpose(1, 2).flatten(1, 2)
        return heads.reshape(stored.shape)

    return reorder

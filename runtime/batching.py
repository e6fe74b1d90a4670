"""Which requests run together: those of similar shape, and first the rankings of the same prompt.

Prompts lie side by side on a graph's batch axis, each in its own slot. Rankings of the same prompt share its slot,
one after another on the candidates' axis, so that the prompt is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .artifact.limits import TooLargeError

__all__ = ["Batchable", "Shape", "TooLargeError", "batch_size", "padded_tokens", "plan"]


@dataclass(frozen=True)
class Shape:
    """The size of a request: `candidates` of at most `length` tokens after a prompt of `prompt` tokens."""

    candidates: int
    prompt: int
    length: int


# A request may join one of this many latest groups.
_OPEN = 8


class Batchable(Protocol):
    """A request that can run together with others of its kind.

    Attributes:
        key: only requests with equal keys run together; None for one that runs alone.
        shape: its size, padded by itself.
        tokens: how many of these tokens are real, without the prompt's.
        prompt_slot: equal for requests whose prompts are the same.
    """

    @property
    def key(self) -> Hashable: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def tokens(self) -> int: ...

    @property
    def prompt_slot(self) -> Hashable: ...


def padded_tokens(slots: int, shape: Shape) -> int:
    """Tokens that a run computes, padding included."""
    return slots * (shape.prompt + shape.candidates * shape.length)


class _Group:
    """Requests that run together, while they are collected."""

    def __init__(self, request: Batchable, index: int) -> None:
        self.key, self.indices = request.key, [index]
        # Candidates in each prompt slot.
        self.slots = {request.prompt_slot: request.shape.candidates}
        self.shape, self.real_tokens = request.shape, request.shape.prompt + request.tokens

    def add(self, request: Batchable, index: int, fits: Callable[[int, Shape], bool], waste: float) -> bool:
        """Add a request if the run stays within its bounds; whether it was added."""
        if request.key is None or request.key != self.key:
            return False
        shape, shared = request.shape, request.prompt_slot in self.slots
        in_slot = self.slots.get(request.prompt_slot, 0) + shape.candidates
        slots = len(self.slots) + (not shared)
        joint = Shape(
            max(in_slot, self.shape.candidates),
            max(shape.prompt, self.shape.prompt),
            max(shape.length, self.shape.length),
        )
        real_tokens = self.real_tokens + request.tokens + (0 if shared else shape.prompt)
        if not fits(slots, joint) or real_tokens < (1 - waste) * padded_tokens(slots, joint):
            return False
        self.slots[request.prompt_slot] = in_slot
        self.shape, self.real_tokens = joint, real_tokens
        self.indices.append(index)
        return True


def plan(requests: Sequence[Batchable], fits: Callable[[int, Shape], bool], waste: float) -> list[list[int]]:
    """Which requests run together: each group as indices in the order of the requests, and the groups likewise.

    The same requests give the same plan.

    Args:
        requests: at least one.
        fits: whether a run of a number of prompt slots, each of a shape, is allowed; a request by itself always is.
        waste: maximum share of a joint run's tokens that may be padding, in [0, 1).
    """
    keys: dict[Hashable, int] = {}
    slots: dict[Hashable, int] = {}
    # The largest first, and those of the same prompt together.
    sizes: dict[Hashable, int] = {}
    for request in requests:
        keys.setdefault(request.key, len(keys))
        slots.setdefault(request.prompt_slot, len(slots))
        size = request.shape.candidates * request.shape.length
        sizes[request.prompt_slot] = max(sizes.get(request.prompt_slot, 0), size)

    def order(i: int) -> tuple[int, int, int]:
        slot = requests[i].prompt_slot
        return keys[requests[i].key], -sizes[slot], slots[slot]

    groups: list[_Group] = []
    for i in sorted(range(len(requests)), key=order):
        if not any(group.add(requests[i], i, fits, waste) for group in groups[: -_OPEN - 1 : -1]):
            groups.append(_Group(requests[i], i))
    return sorted(sorted(group.indices) for group in groups)


def batch_size(requests: Sequence[Batchable]) -> tuple[int, int]:
    """Tokens of a joint run: the real ones, and those that it computes."""
    group = _Group(requests[0], 0)
    for i, request in enumerate(requests[1:], 1):
        group.add(request, i, lambda slots, shape: True, 1.0)
    return group.real_tokens, padded_tokens(len(group.slots), group.shape)

"""Which requests run together: those that cost less together than one by one.

Prompts lie side by side on a graph's batch axis, each in its own slot. Rankings of the same prompt share its slot,
one after another on the candidates' axis, so that the prompt is computed once. The slots of a run are equally large,
so requests of different sizes are padded.

A run costs its tokens, padding included, and something that does not depend on them: every weight is read, every
operator is called. Joining saves the latter, and the prompt where it is the same, and costs the padding. From a few
hundred tokens on, a run costs in proportion to its tokens: joining two of them saves nothing, and both would wait
for the later one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

from .artifact.limits import TooLargeError

__all__ = ["CALL_TOKENS", "Batchable", "Shape", "TooLargeError", "batch_size", "company", "padded_tokens", "plan"]

# What a run costs beside its tokens, in tokens. On the CPU it was measured, with models of 3 and 135 million parameters
# (`python -m benchmarks.joint`). On CUDA it is estimated: a GPU reads the weights faster, but computes yet faster.
CALL_TOKENS = {"cpu": 30, "cuda": 512}
# A request joins others only if that saves this share of what it costs by itself; those that wait longer for less
# would not notice.
_WORTH = 0.1
# How many requests, next in order of size, are looked at for each run that is planned.
_NEIGHBOURS = 64


class Shape(NamedTuple):
    """The size of a request: `candidates` of at most `length` tokens after a prompt of `prompt` tokens.

    The first `kept` tokens of the prompt were computed before.
    """

    candidates: int
    prompt: int
    length: int
    kept: int = 0


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
    return slots * (shape.prompt - shape.kept + shape.candidates * shape.length)


class _Group:
    """Requests that run together, while they are collected."""

    def __init__(self, first: Batchable) -> None:
        self.shape = first.shape
        # Candidates in each prompt slot.
        self.slots = {first.prompt_slot: self.shape.candidates}

    def with_one(self, request: Batchable) -> tuple[int, Shape]:
        """The number of slots, and their shape, once a request is added."""
        shape, in_slot = request.shape, self.slots.get(request.prompt_slot, 0)
        joint = Shape(
            max(in_slot + shape.candidates, self.shape.candidates),
            max(shape.prompt, self.shape.prompt),
            max(shape.length, self.shape.length),
            min(shape.kept, self.shape.kept),
        )
        return len(self.slots) + (not in_slot), joint

    def add(self, request: Batchable) -> None:
        _, self.shape = self.with_one(request)
        self.slots[request.prompt_slot] = self.slots.get(request.prompt_slot, 0) + request.shape.candidates


def company(
    requests: Sequence[Batchable], fits: Callable[[int, Shape], bool], cost: Callable[[int, Shape], float]
) -> list[int]:
    """Which requests run together with the first, as indices in the order of the requests, the first included.

    Those that save most join first. The same requests give the same company.

    Args:
        requests: at least one.
        fits: whether a run of a number of prompt slots, each of a shape, is allowed; a request by itself always is.
        cost: of such a run, in any unit.
    """
    first, found = requests[0], [0]
    if first.key is None:
        return found
    group = _Group(first)
    taken = cost(1, group.shape)

    def saves(request: Batchable, alone: float) -> float:
        """What joining saves, as a share of what the request costs by itself."""
        return (taken + alone - cost(*group.with_one(request))) / alone

    pairs = []
    for i, request in enumerate(requests):
        if i and request.key == first.key:
            alone = cost(1, request.shape)
            if (saved := saves(request, alone)) >= _WORTH:
                pairs.append((-saved, i, alone))
    for _, i, alone in sorted(pairs):
        if fits(*group.with_one(requests[i])) and saves(requests[i], alone) >= _WORTH:
            group.add(requests[i])
            taken = cost(len(group.slots), group.shape)
            found.append(i)
    return sorted(found)


def plan(
    requests: Sequence[Batchable], fits: Callable[[int, Shape], bool], cost: Callable[[int, Shape], float]
) -> list[list[int]]:
    """Divide requests into runs: each as indices in the order of the requests, and the runs likewise.

    The same requests give the same plan. The arguments are those of `company`.
    """
    keys: dict[Hashable, int] = {}
    slots: dict[Hashable, int] = {}
    # The largest first, and those of the same prompt together.
    sizes: dict[Hashable, int] = {}
    for request in requests:
        keys.setdefault(request.key, len(keys))
        slots.setdefault(request.prompt_slot, len(slots))
        size = padded_tokens(1, request.shape)
        sizes[request.prompt_slot] = max(sizes.get(request.prompt_slot, 0), size)

    def order(i: int) -> tuple[int, int, int]:
        slot = requests[i].prompt_slot
        return keys[requests[i].key], -sizes[slot], slots[slot]

    left = sorted(range(len(requests)), key=order)
    groups = []
    while left:
        near = left[:_NEIGHBOURS]
        group = {near[i] for i in company([requests[i] for i in near], fits, cost)}
        groups.append(sorted(group))
        left = [i for i in near if i not in group] + left[_NEIGHBOURS:]
    return sorted(groups)


def batch_size(requests: Sequence[Batchable]) -> tuple[int, int]:
    """Tokens of a joint run without those that are kept from before: the real ones, and with padding."""
    group = _Group(requests[0])
    for request in requests[1:]:
        group.add(request)
    prompts = {request.prompt_slot: request.shape.prompt - request.shape.kept for request in requests}
    real = sum(prompts.values()) + sum(request.tokens for request in requests)
    return real, padded_tokens(len(group.slots), group.shape)

"""What recent prompts began with: a system prompt, examples or a rubric that many of them share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator

from ..arrays import Array

__all__ = ["BLOCK", "Beginnings", "block_keys"]

# Beginnings are compared in blocks of this many tokens, so that a few tokens that are equal by chance change nothing.
BLOCK = 16
# Blocks that are remembered: those of a thousand prompts of a thousand tokens.
_MOST = 65536


def block_keys(prompt: Array) -> Iterator[int]:
    """For each whole block of a prompt, a number that is equal for prompts that are equal up to its end."""
    key = 0
    for end in range(BLOCK, len(prompt) + 1, BLOCK):
        key = hash((key, prompt[end - BLOCK : end].tobytes()))
        yield key


class Beginnings:
    """The beginnings of the prompts that came last, as numbers only. Safe to share between threads."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, None] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, keys: list[int]) -> int:
        """Remember a prompt, by its `block_keys`; how many of its blocks an earlier one began with too."""
        with self._lock:
            shared = next((i for i, key in enumerate(keys) if key not in self._known), len(keys))
            for key in keys:
                self._known[key] = None
                self._known.move_to_end(key)
            while len(self._known) > _MOST:
                self._known.popitem(last=False)
        return shared

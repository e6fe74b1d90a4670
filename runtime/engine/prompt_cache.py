"""The keys and values of prompts, and of what prompts begin with, so that ranking computes only what comes after."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from ..arrays import Array
from ..artifact.manifest import Graph, Manifest
from ..selection.gate import last_header
from .beginnings import BLOCK, Beginnings, block_keys
from .device import HeldArray, on_host
from .session import Session, Stop

__all__ = ["PREFILL", "RANK_CACHED", "PromptCache", "as_past", "nothing_read"]

T = TypeVar("T")
PREFILL, RANK_CACHED = "rank_prefill", "rank_cached"
# A prompt is read in pieces of this many tokens: the linear layers take the memory of a piece.
_PIECE = 512


def nothing_read(prefill: Graph, batch: int) -> dict[str, Array]:
    """The past of `batch` prompts of which nothing has been read: inputs of `rank_prefill` or `prefill`."""
    return {
        value.name: np.zeros((batch, *(size if isinstance(size, int) else 1 for size in value.shape[1:])), value.dtype)
        for value in prefill.inputs
        if value.name.startswith("past_")
    }


def as_past(values: Mapping[str, T]) -> dict[str, T]:
    """Keys and values that `rank_prefill` or `prefill` gave, as its inputs."""
    return {name.replace("prompt", "past"): value for name, value in values.items()}


@dataclass(eq=False)
class _Entry:
    """A prompt and its keys and values, by the names of `rank_cached`'s inputs; they come when `ready` is set.

    `beginning` is the number of its last block, if it is what several prompts begin with.
    """

    prompt: Array
    size: int
    beginning: int | None = None
    values: dict[str, HeldArray] = field(default_factory=dict)
    ready: threading.Event = field(default_factory=threading.Event)

    def shared(self, prompt: Array) -> int:
        """How many tokens at the beginning are the same."""
        count = min(len(self.prompt), len(prompt))
        same = self.prompt[:count] == prompt[:count]
        differs = np.flatnonzero(~(same if same.ndim == 1 else same.all(1)))
        return int(differs[0]) if len(differs) else count


class PromptCache:
    """The prompts that were used last, within a number of bytes. Safe to share between threads.

    A prompt that begins like one in the cache, as the next turn of a conversation does, continues from there.

    Args:
        manifest: of the artifact.
        session: gives the session of a graph.
        limit: bytes of all prompts together; with 0 nothing is kept.
    """

    def __init__(self, manifest: Manifest, session: Callable[[str], Session], limit: int) -> None:
        self._manifest, self._session, self._limit = manifest, session, limit
        self._lock = threading.Lock()
        # The one used last is at the end.
        self._entries: list[_Entry] = []
        self._beginnings = Beginnings()

    @property
    def size(self) -> int:
        """Bytes of what is kept."""
        with self._lock:
            return sum(entry.size for entry in self._entries)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    def keeps(self, length: int) -> bool:
        """Whether a prompt of so many tokens can be kept."""
        return {PREFILL, RANK_CACHED} <= {*self._manifest.graphs} and self._bytes(length) <= self._limit

    def covers(self, prompt: Array) -> bool:
        """Whether at least half of a prompt, (P,) int64 or (P, embed_dim) float32, was read ahead or is being read."""
        _, shared = self._best(prompt, ahead=True)
        return 0 < len(prompt) <= 2 * shared and self.keeps(len(prompt))

    def shared(self, prompt: Array, least: int) -> int:
        """How many tokens of a prompt to continue from with `after`: what others began with, too. The prompt is noted.

        What is kept already is preferred to a little more that would have to be read.

        Args:
            prompt: (P,) int64 or (P, embed_dim) float32.
            least: number of tokens that are worth a run of their own.

        Returns:
            0 if it shares fewer than these with earlier ones, or less than half of it.
        """
        if self._manifest.scoring.gate_tokens or len(prompt) < least:
            # A gate reads the last header of a prompt, which the beginning does not hold.
            return 0
        keys = [*block_keys(prompt)]
        seen = self._beginnings.note(keys) * BLOCK
        with self._lock:
            kept = {entry.beginning for entry in self._entries}
        count = next((i + 1 for i in reversed(range(len(keys))) if keys[i] in kept), 0) * BLOCK
        if seen >= count + least:
            count = seen
        return count if len(prompt) <= 2 * count and self.keeps(count) else 0

    def after(self, prompts: Array, mask: Array, beginning: int, stop: Stop | None = None) -> dict[str, HeldArray]:
        """The keys and values of prompts of which the first `beginning` tokens are the same: only these are kept.

        Args:
            prompts: (B, P) int64 or (B, P, embed_dim) float32.
            mask: (B, P) int64.
            beginning: at most P.
            stop: ends the run.
        """
        values = self.read(prompts[0, :beginning], stop, beginning=True)
        if beginning == prompts.shape[1]:
            return values
        past: Mapping[str, Array | HeldArray] = values
        if len(prompts) > 1:
            past = {name: np.repeat(on_host(value), len(prompts), 0) for name, value in values.items()}
        return self._continue(prompts, mask, beginning, past, stop)

    def read(self, prompt: Array, stop: Stop | None = None, *, beginning: bool = False) -> dict[str, HeldArray]:
        """The keys and values of a prompt, where the graphs run; they are kept if there is room.

        A prompt that another thread reads is waited for.

        Args:
            prompt: (P,) int64 or (P, embed_dim) float32, with P > 0.
            stop: ends the run.
            beginning: whether it is what several prompts begin with; it then stays beside those.
        """
        begun, shared = self._best(prompt)
        if begun is not None and shared == len(prompt) == len(begun.prompt):
            begun.ready.wait()
            if begun.values:
                self._touch(begun)
                return begun.values
        # A copy: the caller may fill the same array with another prompt.
        prompt = prompt.copy()
        entry = _Entry(prompt, self._bytes(len(prompt)), [*block_keys(prompt)][-1] if beginning else None)
        self._make_room(entry)
        try:
            if begun is not None:
                begun.ready.wait()
            if begun is None or not begun.values:
                shared, past = 0, self._nothing()
            else:
                shared, past = min(shared, len(prompt) - 1), begun.values
                if (gate := self._gate(prompt)) != self._gate(begun.prompt):
                    # The other prompt's gate reads another place, so from there on this one is read again.
                    shared = min(shared, gate)
            entry.values = self._continue(prompt[None], np.ones((1, len(prompt)), np.int64), shared, past, stop)
        finally:
            entry.ready.set()
            if not entry.values:
                self._drop(entry)
        self._supersede(entry)
        return entry.values

    def _best(self, prompt: Array, ahead: bool = False) -> tuple[_Entry | None, int]:
        """The entry that has most of a prompt's beginning, and how many tokens of it.

        With `ahead`, one that is the beginning of several does not count.
        """
        with self._lock:
            # Of several, one that ends where the prompt does, else the one used last.
            shared = [
                (entry.shared(prompt), len(entry.prompt) == len(prompt), i)
                for i, entry in enumerate(self._entries)
                if not ahead or entry.beginning is None
            ]
            count, _, i = max(shared, default=(0, False, 0))
            return (self._entries[i], count) if count else (None, 0)

    def _continue(
        self, prompts: Array, mask: Array, shared: int, past: Mapping[str, Array | HeldArray], stop: Stop | None
    ) -> dict[str, HeldArray]:
        """Read prompts from number `shared` on, piece by piece; with a gate one prompt."""
        session, (ids, *_) = self._session(PREFILL), self._session(PREFILL).graph.inputs
        values: dict[str, HeldArray] = {}
        for first in range(shared, prompts.shape[1], _PIECE):
            last = min(first + _PIECE, prompts.shape[1])
            feeds = {ids.name: prompts[:, first:last], "prompt_mask": mask[:, :last]}
            if self._manifest.scoring.gate_tokens:
                feeds["gate_position"] = np.array([self._gate(prompts[0])])
            values = session.values({**feeds, **as_past(values or past)}, stop=stop)
        return values

    def _gate(self, prompt: Array) -> int:
        """Where the gate reads a prompt, if the scorer has one; else 0."""
        header = self._manifest.scoring.gate_tokens
        return last_header(prompt, header) if header else 0

    def _nothing(self) -> dict[str, HeldArray]:
        """Keys and values of no tokens."""
        return self._session(PREFILL).hold(nothing_read(self._manifest.graphs[PREFILL], 1))

    def _bytes(self, length: int) -> int:
        return (length + 1) * self._bytes_of_token

    @functools.cached_property
    def _bytes_of_token(self) -> int:
        # A cache holds one place more than tokens; without tokens it is that place.
        return sum(array.nbytes for array in nothing_read(self._manifest.graphs[PREFILL], 1).values())

    def _make_room(self, new: _Entry) -> None:
        """Add an entry if it fits; those that were used least recently go."""
        with self._lock:
            if new.size > self._limit:
                return
            taken = new.size + sum(entry.size for entry in self._entries)
            while taken > self._limit:
                taken -= self._entries.pop(0).size
            self._entries.append(new)

    def _touch(self, entry: _Entry) -> None:
        with self._lock:
            if entry in self._entries:
                self._entries.remove(entry)
                self._entries.append(entry)

    def _drop(self, entry: _Entry) -> None:
        with self._lock:
            if entry in self._entries:
                self._entries.remove(entry)

    def _supersede(self, new: _Entry) -> None:
        """Drop the entries that a new one begins with: what is shared can be had from it.

        What several prompts begin with stays, and so do the entries that it continues.
        """
        with self._lock:
            if new in self._entries and new.beginning is None:
                self._entries = [
                    entry
                    for entry in self._entries
                    if entry is new or entry.beginning is not None or entry.shared(new.prompt) < len(entry.prompt)
                ]

"""Rows that `decode` reads together: each continues a prompt and has read tokens of its own, a number of its own.

The keys and values of the rows are grown by the graph, which also drops, repeats and adds rows, because each row names
the one that it continues. Shapes: M rows; the others as in the graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from bonnx.errors import ArtifactError

from ..arrays import Array
from ..artifact.manifest import Graph
from ..engine.device import HeldArray, on_host
from ..engine.session import Session, Stop
from .prompts import PromptSlots

__all__ = ["GrownRows", "NextTokens", "RowStates", "Rows", "can_join", "check_decode", "zero_caches"]


class RowStates(NamedTuple):
    """What each row reads next: all (M,) int64."""

    tokens: Array
    prompts: Array
    """The slots of the rows' prompts."""
    numbers: Array
    """Of the candidates, for their random numbers."""
    lengths: Array
    """Tokens that each row has read before."""
    sources: Array
    """The row of the last run that each continues; any for a row that has read nothing."""


class NextTokens(NamedTuple):
    """What a run gives, on the host."""

    next_tokens: Array
    """(M,) int64, drawn after the tokens that were read."""
    log_probs: Array
    """(M,) float32, of these."""
    scores: Array | None
    """(M,) float32, of the tokens that were read; None without a scorer."""
    certainties: Array | None
    """(M,) float32, of the distributions that tokens were drawn from, without a scorer."""
    logits: Array | None
    """(M, V) float32, of these distributions, if they were asked for."""


class Rows(Protocol):
    """Runs rows, and keeps their keys and values from one run to the next.

    Attributes:
        prompts: which the rows continue.
    """

    prompts: PromptSlots

    def clear(self) -> None:
        """Forget all rows."""
        ...

    def __call__(self, states: RowStates, *, logits: bool = False, stop: Stop | None = None) -> NextTokens:
        """Let each row read a token and draw the next; a run that fails changes nothing."""
        ...


class GrownRows:
    """Rows whose keys and values grow by a token in each run of `decode`.

    Args:
        session: of `decode`.

    Raises:
        ArtifactError: the graph was written by an earlier version.
    """

    def __init__(self, session: Session) -> None:
        check_decode(session)
        self._session, self.prompts = session, PromptSlots(session.graph)
        self._held: dict[str, HeldArray] = {}
        self._changes = -1
        # No row has read a token yet: what a new row continues has no places.
        self._blank = session.hold(zero_caches(session.graph, 1, 0))
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self._cache = self._blank

    def put(self, caches: Sequence[Sequence[Array]]) -> None:
        """Take in rows, as if they were those of the last run.

        Args:
            caches: the keys and values of each, as `take` returns them; none for a row that has read nothing.
        """
        longest = max(cache[0].shape[1] if cache else 0 for cache in caches)
        arrays = zero_caches(self._session.graph, len(caches), longest)
        for i, array in enumerate(arrays.values()):
            for row, cache in zip(array, caches, strict=True):
                if cache:
                    row[:, longest - cache[i].shape[1] :] = cache[i]
        self._cache = self._session.hold(arrays)

    def take(self, lengths: Mapping[int, int]) -> dict[int, list[Array]]:
        """Keys and values (G, length, K) on the host of some rows of the last run, by their numbers.

        Args:
            lengths: the tokens that each has read by now.
        """
        arrays = [on_host(value) for value in self._cache.values()] if lengths else []
        return {i: [array[i, :, array.shape[2] - n :].copy() for array in arrays] for i, n in lengths.items()}

    def __call__(self, states: RowStates, *, logits: bool = False, stop: Stop | None = None) -> NextTokens:
        """Let each row read a token and draw the next."""
        if self._changes != self.prompts.changes:
            count = self.prompts.count
            self._held = self._session.hold({name: array[:count] for name, array in self.prompts.arrays.items()})
            self._changes = self.prompts.changes
        feeds = {**self._held, **self._cache, **states._asdict()}
        outputs = self._session.values(feeds, logits=logits, stop=stop)
        tokens, log_probs = on_host(outputs["next_tokens"]), on_host(outputs["log_probs"])
        others = [on_host(outputs[name]) if name in outputs else None for name in ("scores", "certainties", "logits")]
        self._cache = {name: outputs[f"grown_{name}"] for name in self._cache}
        return NextTokens(tokens, log_probs, *others)


def zero_caches(graph: Graph, rows: int, tokens: int) -> dict[str, Array]:
    """Keys and values of rows by the names of the graph's inputs, (rows, G, tokens, K) float32 each."""
    shapes = {value.name: value.shape for value in graph.inputs if value.name.startswith(("key.", "value."))}
    return {
        name: np.zeros((rows, int(heads), tokens, int(size)), np.float32)
        for name, (_, heads, _, size) in shapes.items()
    }


def can_join(session: Session) -> bool:
    """Whether rows can join and leave in a `decode` graph, as since this version."""
    return "sources" in {value.name for value in session.graph.inputs}


def check_decode(session: Session) -> None:
    """Refuse a `decode` graph whose rows cannot join and leave.

    Raises:
        ArtifactError: it was written by an earlier version.
    """
    if not can_join(session):
        raise ArtifactError(
            "the graph decode was written by an earlier version of bonnx: its rows cannot join and leave; export the "
            "model again"
        )

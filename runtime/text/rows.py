"""Rows for a graph, read from texts and arrays; what cannot be read is kept apart, with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from bonnx.errors import InputError

from ..arrays import Array
from ..checks import ArgumentNames
from .compose import TextItem
from .tokenizer import TokenizedRow

__all__ = ["EncodedRows", "NoneReadableError", "UnreadItems", "none_readable"]


class NoneReadableError(InputError):
    """None of several items can be read.

    Attributes:
        reasons: why, for each.
    """

    def __init__(self, names: ArgumentNames, reasons: Mapping[int, str]) -> None:
        super().__init__(none_readable(names, reasons))
        self.reasons = reasons


def none_readable(names: ArgumentNames, reasons: Mapping[int, str]) -> str:
    """The message for several items of which none can be read."""
    shown = [f"{names.candidate(i)}: {reason}" for i, reason in sorted(reasons.items())[:3]]
    if len(reasons) == 1:
        return shown[0]
    rest = f"; and {len(reasons) - len(shown)} more" if len(reasons) > len(shown) else ""
    return f"{names.candidates}: none can be read: {'; '.join(shown)}{rest}"


@dataclass(frozen=True)
class EncodedRows:
    """Rows for a graph.

    Attributes:
        prompt: (P,) int64 or (P, embed_dim) float32, read once for all rows; None for rows that stand alone.
        items: the rows after the prompt, of the same kinds.
        skip: number of tokens at the beginning of each row that still belong to the prompt, whose end is tokenized
            differently in each.
        ends: for each row (its length,) bool, where a step ends; None if the rows do not tell.
        unreadable: the reason for each row that could not be read; it has no tokens here.
        cut: number of tokens dropped from the prompt.
    """

    prompt: Array | None
    items: list[Array]
    skip: list[int]
    ends: list[NDArray[np.bool_]] | None
    unreadable: dict[int, str]
    cut: int = 0

    def after(self, count: int) -> EncodedRows:
        """The same rows with a prompt of `count` tokens: the rest of it is at the beginning of each row, to be skipped.

        A row without tokens stays empty.
        """
        assert self.prompt is not None
        prompt, rest = self.prompt[:count], self.prompt[count:]
        items = [np.concatenate([rest, item]) if len(item) else item for item in self.items]
        ends = self.ends
        if ends is not None:
            before = np.zeros(len(rest), np.bool_)
            ends = [np.concatenate([before, end]) if len(end) else end for end in ends]
        skip = [len(rest) + skipped if len(item) else 0 for skipped, item in zip(self.skip, self.items, strict=True)]
        return replace(self, prompt=prompt, items=items, ends=ends, skip=skip)


@dataclass
class UnreadItems:
    """Items by their index while they are read: texts become rows, and unreadable items move to `unreadable`."""

    called: ArgumentNames
    count: int
    blank: Array
    texts: dict[int, TextItem] = field(default_factory=dict)
    arrays: dict[int, Array] = field(default_factory=dict)
    read: dict[int, TokenizedRow] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """What an error calls each of the texts."""
        return [self.called.candidate(i) for i in self.texts]

    def refuse(self, i: int, reason: str) -> None:
        """Mark an item as unreadable."""
        self.texts.pop(i, None)
        self.arrays.pop(i, None)
        self.unreadable[i] = reason

    def take(self, read: Sequence[TokenizedRow | str]) -> None:
        """Take the row of each text, or the reason that it cannot be read."""
        for i, row in zip([*self.texts], read, strict=True):
            if isinstance(row, str):
                self.refuse(i, row)
            else:
                self.read[i] = row
        self.check()

    def check(self) -> None:
        """Raises InputError if nothing is left."""
        if len(self.unreadable) == self.count:
            raise NoneReadableError(self.called, self.unreadable)

    def rows_behind_prompt(self) -> EncodedRows:
        """Rows of texts that begin with the same prompt."""
        rows = [*self.read.values()]
        shared = min(min(row.first, len(row.ids) - 1) for row in rows)
        first = np.array(rows[0].ids[:shared], np.int64)
        for row in rows[1:]:
            differs = np.flatnonzero(np.array(row.ids[:shared]) != first[:shared])
            shared = int(differs[0]) if len(differs) else shared
        return self.rows(first[:shared], shared)

    def rows(self, prompt: Array | None, shared: int = 0) -> EncodedRows:
        """All items; the first `shared` tokens of each text are the prompt's."""
        ids = {i: np.array(row.ids[shared:], np.int64) for i, row in self.read.items()}
        items = [ids[i] if i in ids else self.arrays.get(i, self.blank) for i in range(self.count)]
        skip = [max(0, self.read[i].first - shared) if i in ids else 0 for i in range(self.count)]
        ends = None
        if not self.arrays and all(row.ends is not None for row in self.read.values()):
            places = [self.read[i].ends or [] if i in ids else [] for i in range(self.count)]
            ends = [
                np.isin(np.arange(len(item)) + shared, row_places)
                for item, row_places in zip(items, places, strict=True)
            ]
        return EncodedRows(prompt, items, skip, ends, self.unreadable)

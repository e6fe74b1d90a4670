"""What a caller passes becomes the arrays that a graph takes; whatever cannot be ranked is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .manifest import AGGREGATIONS, Manifest
from .session import Array
from .text import Text

__all__ = ["Item", "Reader", "aggregation_code", "check_some", "is_stepwise", "pad", "step_mask"]

# A text, token ids, or embeddings (length, embed_dim) float32.
Item: TypeAlias = str | Sequence[int] | NDArray[np.integer] | NDArray[np.float32]


def is_stepwise(name: str) -> bool:
    """Whether an aggregation reads only the positions where a step ends."""
    return name.startswith("step_")


def aggregation_code(name: str) -> int:
    """The graph's number for an aggregation.

    Raises:
        InputError: no such aggregation.
    """
    plain = name.removeprefix("step_")
    if plain not in AGGREGATIONS:
        choices = ", ".join([*AGGREGATIONS, *(f"step_{n}" for n in AGGREGATIONS)])
        raise InputError(f"aggregation: expected one of {choices}; got {name!r}")
    return AGGREGATIONS.index(plain)


def check_some(items: Sequence[Item], what: str) -> None:
    """Refuse an empty list, and a text where a list of texts belongs.

    Raises:
        InputError: names `what`.
    """
    if isinstance(items, str) or not len(items):
        raise InputError(f"{what}: expected a list of at least one {what.removesuffix('s')}; got {items!r:.60}")


class Reader:
    """Checks items against the manifest and turns them into arrays (length,) int64 or (length, embed_dim) float32."""

    def __init__(self, manifest: Manifest, text: Text | None) -> None:
        self.text = text
        self.vocabulary = manifest.model.get("vocab_size")
        self.width = None if manifest.kind == "language_model" else manifest.network["embed_dim"]

    def read(self, item: Item, what: str, *, candidate: bool, partial: bool) -> Array:
        """One prompt, candidate or row.

        Raises:
            InputError: `what` cannot be read; the message says why.
        """
        if isinstance(item, str):
            return self._text(item, what, candidate=candidate, partial=partial)
        array = np.asarray(item)
        if self.width is not None:
            return self._embeddings(array, what)
        return self._ids(array, what)

    def stops(self, stop: Sequence[int | str] | None, end_token: int | None) -> tuple[int, ...]:
        """The tokens that end a completion: those given, or the artifact's own.

        Raises:
            InputError: a text that is not one token, or an id outside the vocabulary.
        """
        if stop is None:
            return () if end_token is None else (end_token,)
        if isinstance(stop, str) or not all(isinstance(entry, int | np.integer | str) for entry in stop):
            raise InputError(f"stop: expected a list of token ids or of texts; got {stop!r:.60}")
        found = []
        for entry in stop:
            if isinstance(entry, str):
                if self.text is None:
                    raise InputError(f"stop: this artifact has no tokenizer; pass token ids instead of {entry!r}")
                found.append(self.text.encode_stop(entry))
            else:
                found.append(int(self._ids(np.array([entry]), "stop")[0]))
        return tuple(found)

    def _text(self, item: str, what: str, *, candidate: bool, partial: bool) -> Array:
        if self.text is None:
            takes = "token ids" if self.width is None else f"embeddings (length, {self.width}) float32"
            raise InputError(f"{what}: this artifact has no tokenizer; pass {takes} instead of text")
        if not item:
            raise InputError(f"{what}: it has no tokens; expected at least one")
        ids = self.text.encode_candidate(item, what, partial=partial) if candidate else self.text.encode(item, what)
        return np.array(ids, np.int64)

    def _embeddings(self, array: Array, what: str) -> Array:
        if array.ndim != 2 or array.shape[1] != self.width:
            raise InputError(
                f"{what}: expected embeddings of shape (length, {self.width}); got {array.shape}, {array.dtype}"
            )
        if array.dtype != np.float32:
            raise InputError(f"{what}: expected float32 embeddings; got {array.dtype}; convert with .astype('float32')")
        if not len(array):
            raise InputError(f"{what}: it has no tokens; expected at least one")
        return array

    def _ids(self, array: Array, what: str) -> Array:
        if array.ndim == 1 and not array.size:
            raise InputError(f"{what}: it has no tokens; expected at least one")
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"{what}: expected text or a 1-D list of token ids; got {array.dtype} {array.shape}")
        assert self.vocabulary is not None
        outside = array[(array < 0) | (array >= self.vocabulary)]
        if outside.size:
            raise InputError(f"{what}: token id {outside[0]} is outside the vocabulary (0 to {self.vocabulary - 1})")
        return array.astype(np.int64)


def pad(items: Sequence[Array], fill: int, length: int | None = None) -> tuple[Array, Array]:
    """Stack items of one kind, padded on the right: values (rows, T[, E]) and mask (rows, T) int64."""
    length = max((len(item) for item in items), default=0) if length is None else length
    first = items[0]
    values = np.full((len(items), length, *first.shape[1:]), fill if first.ndim == 1 else 0, first.dtype)
    mask = np.zeros((len(items), length), np.int64)
    for row, item in enumerate(items):
        values[row, : len(item)] = item
        mask[row, : len(item)] = 1
    return values, mask


def step_mask(values: Array, given: Sequence[Sequence[int]] | None, step_token: int | None) -> Array:
    """Where steps end in padded rows (rows, T[, E]): int64 (rows, T), from the step token or as the caller marks them.

    Raises:
        InputError: no step token and nothing given, or marks that do not fit the rows.
    """
    rows, length = values.shape[:2]
    if given is None:
        if step_token is None or values.ndim != 2:
            raise InputError("a step aggregation needs step_masks here: the artifact's scoring rule has no step token")
        found: Array = (values == step_token).astype(np.int64)
        return found
    if len(given) != rows:
        raise InputError(f"step_masks: expected one for each of {rows} rows; got {len(given)}")
    mask = np.zeros((rows, length), np.int64)
    for row, marks in enumerate(given):
        array = np.asarray(marks)
        if array.ndim != 1 or len(array) > length or not (np.isin(array, (0, 1)).all()):
            raise InputError(
                f"step_masks[{row}]: expected 0 or 1 for each of at most {length} tokens; got {array.shape}"
            )
        mask[row, : len(array)] = array
    return mask

"""Rows of one kind as one array, and where their steps end."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np

from bonnx.errors import InputError

from ..arrays import Array
from ..checks import is_list, shown

__all__ = ["check_masks", "pad", "step_mask"]


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


def step_mask(
    values: Array, given: Sequence[Sequence[int]] | None, skip: Sequence[int], step_token: int | None
) -> Array:
    """Where steps end in padded rows (rows, T[, E]): int64 (rows, T), from the step token or as the caller marks them.

    The caller's marks begin behind the tokens to be skipped.

    Raises:
        InputError: no step token and nothing given, or marks that do not fit the rows.
    """
    rows, length = values.shape[:2]
    if given is None:
        if step_token is None or values.ndim != 2:
            raise InputError("a step aggregation needs step_masks here: the artifact's scoring rule has no step token")
        found: Array = (values == step_token).astype(np.int64)
        return found
    check_masks(given, [length - taken for taken in skip])
    mask = np.zeros((rows, length), np.int64)
    for row, marks in enumerate(given):
        mask[row, skip[row] : skip[row] + len(marks)] = marks
    return mask


def check_masks(given: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
    """Refuse what is not, for each row, 0 or 1 for each of at most so many tokens.

    Raises:
        InputError: names the row.
    """
    if not is_list(given) or len(given) != len(lengths):
        found = len(given) if is_list(given) else shown(given)
        raise InputError(f"step_masks: expected a list with one for each of {len(lengths)} rows; got {found}")
    for row, (marks, length) in enumerate(zip(given, lengths, strict=True)):
        if not is_list(marks) or not all(isinstance(mark, Real | np.bool_) and mark in (0, 1) for mark in marks):
            raise InputError(f"step_masks[{row}]: expected a list of 0 or 1 for each token; got {shown(marks)}")
        if len(marks) > length:
            raise InputError(
                f"step_masks[{row}]: expected 0 or 1 for each of at most {length} tokens; got {len(marks)} of them"
            )

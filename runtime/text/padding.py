"""Rows padded into one array, and the masks of where their steps end."""

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
    values: Array, step_masks: Sequence[Sequence[int]] | None, skip: Sequence[int], step_token: int | None
) -> Array:
    """Where steps end in padded rows (rows, T[, E]): int64 (rows, T), from the step token or the caller's masks.

    The caller's masks begin after the skipped tokens.

    Raises:
        InputError: no step token and no masks, or marks that do not fit the rows.
    """
    rows, length = values.shape[:2]
    if step_masks is None:
        if step_token is None or values.ndim != 2:
            raise InputError("a step aggregation needs step_masks here: the artifact's scoring rule has no step token")
        mask: Array = (values == step_token).astype(np.int64)
        return mask
    check_masks(step_masks, [length - taken for taken in skip])
    mask = np.zeros((rows, length), np.int64)
    for row, marks in enumerate(step_masks):
        mask[row, skip[row] : skip[row] + len(marks)] = marks
    return mask


def check_masks(step_masks: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
    """Refuse step masks that do not mark each of a row's tokens with 0 or 1.

    Args:
        step_masks: one for each row.
        lengths: the maximum number of marks of each row.

    Raises:
        InputError: names the row.
    """
    if not is_list(step_masks) or len(step_masks) != len(lengths):
        got = len(step_masks) if is_list(step_masks) else shown(step_masks)
        raise InputError(f"step_masks: expected a list with one for each of {len(lengths)} rows; got {got}")
    for row, (marks, length) in enumerate(zip(step_masks, lengths, strict=True)):
        if not is_list(marks) or not all(isinstance(mark, Real | np.bool_) and mark in (0, 1) for mark in marks):
            raise InputError(f"step_masks[{row}]: expected a list of 0 or 1 for each token; got {shown(marks)}")
        if len(marks) > length:
            raise InputError(
                f"step_masks[{row}]: expected 0 or 1 for each of at most {length} tokens; got {len(marks)} of them"
            )

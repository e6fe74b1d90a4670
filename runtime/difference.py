"""How far two engines' outputs are apart."""

from __future__ import annotations

import numpy as np

from .session import Array

__all__ = ["greatest_difference"]


def greatest_difference(found: Array, expected: Array, relative: float, absolute: float) -> float:
    """The greatest `|found - expected|`; NaN equals NaN.

    Raises:
        ValueError: other shapes or NaNs, or somewhere it is more than `relative * |expected| + absolute`.
    """
    if found.shape != expected.shape:
        raise ValueError(f"expected shape {expected.shape}, found {found.shape}")
    if not np.array_equal(np.isnan(found), np.isnan(expected)):
        raise ValueError("NaN where none was expected, or none where one was")
    difference = np.nan_to_num(np.abs(found.astype(np.float64) - expected))
    greatest = float(difference.max(initial=0.0))
    if (difference > relative * np.abs(np.nan_to_num(expected)) + absolute).any():
        raise ValueError(f"differs from PyTorch by {greatest:.3g}; allowed: {relative} relative + {absolute} absolute")
    return greatest

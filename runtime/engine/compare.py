"""The difference between the outputs of two engines."""

from __future__ import annotations

import numpy as np

from ..arrays import Array

__all__ = ["maximum_difference"]


def maximum_difference(actual: Array, expected: Array, allowed: float | Array) -> float:
    """The maximum `|actual - expected|`; NaN equals NaN.

    Args:
        actual: the outputs of one engine.
        expected: those of the other, of the same shape.
        allowed: the maximum difference, for all or for each element.

    Raises:
        ValueError: the shapes or the NaNs differ, or a difference exceeds what is allowed.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"expected shape {expected.shape}, got {actual.shape}")
    if not np.array_equal(np.isnan(actual), np.isnan(expected)):
        raise ValueError("NaN where none was expected, or none where one was")
    equal = actual == expected  # infinities too, whose difference is NaN
    with np.errstate(invalid="ignore"):
        difference = np.where(equal | np.isnan(actual), 0.0, np.abs(actual.astype(np.float64) - expected))
    excess = difference - allowed
    if (excess > 0).any():
        place = np.unravel_index(int(np.argmax(excess)), excess.shape)
        limit = float(np.broadcast_to(allowed, excess.shape)[place])
        raise ValueError(f"differs from PyTorch by {difference[place]:.3g}; allowed: {limit:.3g}")
    return float(difference.max(initial=0.0))

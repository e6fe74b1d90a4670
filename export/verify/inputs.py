"""Parts of the random inputs with which graphs are verified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["padding_mask", "put_header"]

Array = NDArray[Any]


def padding_mask(sizes: Array, length: int, padding: str) -> Array:
    """Return the mask (..., length) int64 of rows of the given sizes (...), padded on the `left` or the `right`."""
    index = np.arange(length)
    real = index >= length - sizes[..., None] if padding == "left" else index < sizes[..., None]
    return real.astype(np.int64)


def put_header(rng: np.random.Generator, header: Sequence[int], row: Array, places: Array) -> None:
    """Write the header that a gate looks for somewhere into consecutive places of a row of tokens."""
    if header:
        first = places[0] + rng.integers(0, len(places) - len(header) + 1)
        row[first : first + len(header)] = header

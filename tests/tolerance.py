"""The one table of tolerances: |a - b| <= relative * |b| + absolute."""

import numpy as np

GOLDEN = (1e-5, 2e-6)
RUNTIME = (1e-4, 2e-5)


def within(found: object, expected: object, tolerance: tuple[float, float]) -> bool:
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    return bool((np.abs(a - b) <= tolerance[0] * np.abs(b) + tolerance[1]).all())

"""Settings that are a number or the square root of the budget."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from ..checks import check_whole

__all__ = ["Count", "as_count", "check_count"]

Count: TypeAlias = int | Literal["sqrt"]


def check_count(name: str, value: Count) -> None:
    """Refuse anything but a whole number from 1 and `sqrt`.

    Raises:
        InputError: names it.
    """
    if not (isinstance(value, str) and value == "sqrt"):
        check_whole(name, value, 1, ", or 'sqrt'")


def as_count(value: Count, budget: int) -> int:
    """The number, for a budget."""
    return max(1, round(math.sqrt(budget))) if value == "sqrt" else value

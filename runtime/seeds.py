"""Seeds that follow one another."""

from __future__ import annotations

__all__ = ["seed_after"]


def seed_after(seed: int, count: int) -> int:
    """The seed that comes `count` after another; after the largest of 64 bits the smallest follows."""
    following = seed + count
    # What is out of range from the start stays so, and is refused where it is used.
    return following - 2**64 if following >= 2**63 > seed else following

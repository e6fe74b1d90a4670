"""The stages of an export, for whoever shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Report", "silent"]

Report: TypeAlias = Callable[[str], object]
"""Is called with the name of each stage when it begins."""


def silent(_: str) -> None:
    """Show nothing."""

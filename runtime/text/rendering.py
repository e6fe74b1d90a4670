"""The current rendering of a chat template in this thread: its budget and its time of day."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime

from .budget import Budget, deep_size, shown_size

__all__ = ["current_budget", "current_time", "rendering", "spend_shown"]


_current: ContextVar[tuple[Budget, datetime]] = ContextVar("rendering")


@contextmanager
def rendering(variables: Mapping[str, object], now: datetime, most_bytes: int) -> Iterator[None]:
    """Render in this block.

    Args:
        variables: the variables of the template; larger messages raise the budget.
        now: the time that `strftime_now` formats.
        most_bytes: maximum number of bytes of the variables that raise the budget.
    """
    token = _current.set((Budget(deep_size(dict(variables), most_bytes)), now))
    try:
        yield
    finally:
        _current.reset(token)


def current_budget() -> Budget:
    """The rest of this rendering's budget."""
    return _current.get()[0]


def current_time() -> datetime:
    """The time of day, constant during a rendering."""
    return _current.get()[1]


def spend_shown(value: object, name: str) -> None:
    """Pay for a value as text."""
    budget = current_budget()
    budget.spend(shown_size(value, budget.left), name)

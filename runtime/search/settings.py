"""The settings of search methods: a dataclass's fields, whose annotations hold their bounds and descriptions.

Checks, the HTTP API and its documentation take them from there.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from msgspec import Meta

from bonnx.errors import InputError

from ..checks import Bounds, check_flag, check_number, check_whole, shown
from .count import Count, check_count

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["bounds", "check_values", "definitions"]


def definitions(kind: type[DataclassInstance]) -> dict[str, tuple[Any, Meta]]:
    """Of each setting its type, and its bounds and description."""
    hints = get_type_hints(kind, include_extras=True)
    settings = [(field.name, hints[field.name]) for field in dataclasses.fields(kind)]
    return {name: (hint.__origin__, hint.__metadata__[0]) for name, hint in settings}


def bounds(meta: Meta) -> Bounds:
    """The bounds of a number."""
    return {"ge": meta.ge, "gt": meta.gt, "le": meta.le, "lt": meta.lt}


def check_values(method: DataclassInstance) -> None:
    """Refuse settings of another type, and numbers out of bounds.

    Raises:
        InputError: names the setting.
    """
    for name, (kind, meta) in definitions(type(method)).items():
        value = getattr(method, name)
        if kind is bool:
            check_flag(name, value)
        elif kind is int:
            check_whole(name, value, int(meta.ge or 0))
        elif kind == Count:
            check_count(name, value)
        elif get_origin(kind) is Literal:
            words = get_args(kind)
            if not isinstance(value, str) or value not in words:
                raise InputError(f"{name}: expected {', '.join(words[:-1])} or {words[-1]}; got {shown(value)}")
        elif all(bound is None for bound in bounds(meta).values()):
            check_number(name, value, "a finite number", gt=-math.inf, lt=math.inf)
        else:
            check_number(name, value, **bounds(meta))

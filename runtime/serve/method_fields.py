"""The fields of a request's body that say how to search, made from the definitions of the search methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, create_model

from bonnx.errors import InputError

from ..search.count import Count
from ..search.method import Method
from ..search.methods import METHODS, SETTINGS, make_method
from ..search.settings import bounds

__all__ = ["method_of", "with_method"]

_Model = TypeVar("_Model", bound=BaseModel)


def with_method() -> Callable[[type[_Model]], type[_Model]]:
    """For a body: it gets the field `method`, and one for each setting of a method, with its bounds and description."""

    def add(model: type[_Model]) -> type[_Model]:
        fields: dict[str, Any] = {name: _field(name) for name in SETTINGS}
        fields["method"] = (
            Literal[tuple(METHODS)],
            Field("best_of_n", description="how to spend the budget of completions"),
        )
        return create_model(
            model.__name__, __base__=model, __module__=model.__module__, __doc__=model.__doc__, **fields
        )

    return add


def _field(name: str) -> tuple[Any, Any]:
    """The type of a setting's field, and the field; None is for the method's own default."""
    kind, meta, methods = SETTINGS[name]
    description = f"{', '.join(methods)}: {meta.description}"
    if kind == Count:
        return Annotated[int, Field(strict=True, **bounds(meta))] | Literal["sqrt"] | None, Field(
            None, description=description
        )
    return kind | None, Field(None, description=description, strict=True if kind is int else None, **bounds(meta))


def method_of(body: BaseModel, prefix: str = "") -> tuple[str, Method]:
    """The method that a body asks for: its name, and itself with its settings.

    Args:
        body: of a class that `with_method` made.
        prefix: what errors put before the name of a field.

    Raises:
        InputError: a setting of another method, or an invalid one.
    """
    values: Mapping[str, Any] = {name: getattr(body, name) for name in ("method", *SETTINGS)}
    method = str(values["method"])
    settings = {name: values[name] for name in SETTINGS if values[name] is not None}
    for name in settings:
        if method not in (owners := SETTINGS[name][2]):
            noun = "the method" if len(owners) == 1 else "the methods"
            raise InputError(
                f"{prefix}{name}: belongs to {noun} {', '.join(f'{owner!r}' for owner in owners)}; got '{method}'"
            )
    return method, make_method(method, settings)

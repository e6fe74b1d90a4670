"""What every result can do: become JSON, compare, and show itself as a short repr or a table in a notebook.

JSON has neither NaN nor infinity: `to_json` writes both as null, for the command line, HTTP, batches and searches.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Result", "same", "to_json"]

_MOST_CHARACTERS = 60
_MOST_NUMBERS = 4
_MOST_ROWS = 100


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The base of every result.

    Attributes:
        _optional: fields that `to_dict` leaves out where they are None, 0 or empty; it gives them last, in this order.
        _summary: what the repr shows.
    """

    _optional: ClassVar[tuple[str, ...]] = ()
    _summary: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """The result as a JSON object: arrays become lists, NaN and infinity become None."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in self._optional]
        names += [name for name in self._optional if not _is_empty(getattr(self, name))]
        return {name: to_json(getattr(self, name)) for name in names}

    def __eq__(self, other: object) -> bool:
        """Whether every field is the same; NaN equals NaN."""
        return _same_fields(self, other) if type(self) is type(other) else NotImplemented

    # Arrays can change, and so have no hash.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        names = self._summary or tuple(field.name for field in dataclasses.fields(self))
        if getattr(self, "best_index", None) == -1:
            # Nothing can win yet.
            names = tuple(name for name in names if name != "best")
        parts = [f"{name}={_short(getattr(self, name))}" for name in names]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _columns(self) -> dict[str, Sequence[object]]:
        """The columns of the notebook's table by name, all of the same length."""
        names = [field.name for field in dataclasses.fields(self)]
        return {"": names, "value": [_short(getattr(self, name)) for name in names]}

    def _repr_html_(self) -> str:
        """A table, the winner's row in bold."""
        columns = self._columns()
        rows = [*zip(*columns.values(), strict=True)]
        best = getattr(self, "best_index", None)
        lines = ["".join(f"<th>{html.escape(name)}</th>" for name in columns)]
        for i, row in enumerate(rows[:_MOST_ROWS]):
            tag = "th" if i == best else "td"
            lines.append("".join(f"<{tag} style='text-align: left'>{_cell(value)}</{tag}>" for value in row))
        more = f"<p>{len(rows) - _MOST_ROWS} more rows</p>" if len(rows) > _MOST_ROWS else ""
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>{more}"


def to_json(value: object) -> Any:
    """A value as `json` and `msgspec` write it: numbers, texts, lists and objects, with None for NaN and infinity.

    Args:
        value: a result, an array, a dataclass, or lists and mappings of them. Anything else becomes its text.
    """
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value)


def same(left: object, right: object) -> bool:
    """Whether two values are equal, arrays and nested results included; NaN equals NaN."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return False
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and type(left) is type(right) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if dataclasses.is_dataclass(left) and not isinstance(left, type) and type(left) is type(right):
        return _same_fields(left, right)
    return bool(left == right or (left != left and right != right))


def _same_fields(left: DataclassInstance, right: object) -> bool:
    return all(same(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(left))


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, int | Mapping) and not value)


def _short(value: object) -> str:
    """A value in the repr: a few numbers, the beginning of a text, or how many things it holds."""
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    if isinstance(value, np.ndarray) and value.ndim == 1:
        more = f", ... {len(value)} in all" if len(value) > _MOST_NUMBERS else ""
        return f"[{', '.join(_short(item) for item in value[:_MOST_NUMBERS])}{more}]"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, np.generic):
        return str(value)
    if isinstance(value, list | tuple) and value and (len(value) > _MOST_NUMBERS or isinstance(value[0], Result)):
        return f"<{len(value)} {type(value[0]).__name__}>"
    text = repr(value)
    most = _MOST_CHARACTERS * (3 if isinstance(value, Result) else 1)
    return text if len(text) <= most else text[: most - 3] + "..."


def _cell(value: object) -> str:
    if isinstance(value, float | np.floating):
        return "-" if math.isnan(value) else f"{value:.5f}"
    text = "" if value is None else str(value)
    return html.escape(text if len(text) <= 500 else text[:497] + "...")

"""The budget of a rendering of a chat template: the size of every value is estimated before the value is made.

A template can multiply text in many ways: `*`, `~`, `center`, `%9999999d`, a macro that writes its argument twice. So
the sum is bounded: each operation pays for the bytes that it may make and that it has to read. A rendering then takes
about as much memory as its budget at most, and the time to go through that once.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TypeAlias

from jinja2.exceptions import TemplateError
from jinja2.utils import Namespace

from .parts import ContentParts

__all__ = [
    "STRING",
    "Budget",
    "EndlessError",
    "deep_size",
    "filter_size",
    "method_size",
    "operator_size",
    "shallow_size",
    "shown_size",
    "spec_size",
]

# Turns of all loops and calls of all macros; bytes made and read, and the bytes that each byte of the messages adds.
MAX_TURNS, MAX_BYTES, PER_BYTE = 200_000, 64_000_000, 100
# Bits of an integer: no text for a model needs more.
MAX_BITS = 10_000
# The cost of one operation, apart from what it makes; of a reference in a list; of a short string.
OPERATION, REFERENCE, STRING = 200, 16, 64
# Visiting a value in a list or dictionary costs as much time as this number of bytes.
VISIT = 100
# Maximum growth of a byte that is escaped or shown by Python, and of one whose case changes, for example.
ESCAPED, CHANGED = 6, 3


class EndlessError(TemplateError):
    """A rendering exceeds its budget."""


class Budget:
    """The rest of the budget of one rendering.

    Args:
        variables: bytes of the variables that the template reads.
    """

    def __init__(self, variables: int) -> None:
        self._turns, self._all = MAX_TURNS, MAX_BYTES + PER_BYTE * variables
        self._left = self._all

    def turn(self, constant: int) -> None:
        """Pay for a turn of a loop or a call of a macro with `constant` bytes of the template's own text."""
        self._turns -= 1
        if self._turns < 0:
            raise EndlessError(f"more than {MAX_TURNS} turns of its loops")
        self.spend(constant, "a loop or macro")

    def spend(self, size: int, name: str) -> None:
        """Pay for an operation of `size` bytes."""
        self._left -= OPERATION + size
        if self._left < 0:
            raise EndlessError(f"{name} would exceed the {self._all} bytes that it may make and read")

    @property
    def left(self) -> int:
        """Bytes that may still be made and read."""
        return self._left

    def check(self, value: object, name: str) -> object:
        """The value, unless it is a huge integer; an iterator pays for each item that it yields."""
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise EndlessError(
                f"{name} would be an integer of {value.bit_length()} bits; at most {MAX_BITS} are allowed"
            )
        if isinstance(value, Iterator):
            return self._counted(value, name)
        self.spend(shallow_size(value) if isinstance(value, (list, tuple, dict)) else 0, name)
        return value

    def _counted(self, items: Iterator[object], name: str) -> Iterator[object]:
        for item in items:
            self.spend(REFERENCE + (shallow_size(item) if isinstance(item, (list, tuple)) else 0), name)
            yield item


def shallow_size(value: object) -> int:
    """Bytes of a value without the values that it refers to."""
    if isinstance(value, str):
        return len(value) if value.isascii() else 4 * len(value)
    if isinstance(value, int):
        return 8 + value.bit_length() // 8
    if isinstance(value, (bytes, bytearray)):
        return len(value)
    if isinstance(value, Mapping):
        return 4 * REFERENCE * (1 + len(value))
    return REFERENCE * (1 + operator.length_hint(value, 0)) if hasattr(value, "__iter__") else REFERENCE


def deep_size(value: object, limit: int) -> int:
    """Bytes of a value with all values that it refers to, each time; counting stops above `limit`."""
    if isinstance(value, str):
        return shallow_size(value)
    total, stack = 0, [iter([value])]
    while stack and total <= limit:
        item = next(stack[-1], stack)
        if item is stack:
            stack.pop()
            continue
        total += VISIT + shallow_size(item)  # a namespace may contain itself
        if isinstance(item, Namespace):
            item = object.__getattribute__(item, "_Namespace__attrs")
        if isinstance(item, ContentParts):
            item = item._parts
        if isinstance(item, dict):
            stack.append(chain(item.keys(), item.values()))
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.append(iter(item))
    return total


def shown_size(value: object, limit: int) -> int:
    """Bytes of a value as text."""
    return shallow_size(value) if isinstance(value, str) else ESCAPED * deep_size(value, limit // ESCAPED)


_FIELD = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|[0-9]*)(?:\.(\*|[0-9]*))?")
_DIGITS = re.compile("[0-9]+")


def spec_size(spec: str) -> int:
    """Characters that the widths in a format may add."""
    return sum(_number(digits) for digits in _DIGITS.findall(spec))


def _number(digits: str) -> int:
    return int(digits[:18] or 0)


def format_size(form: str | bytes, values: object, limit: int) -> int:
    """Bytes of `form % values`."""
    text = form.decode("latin-1") if isinstance(form, (bytes, bytearray)) else form
    fields = _FIELD.findall(text)
    widths = sum(_number(digits) for field in fields for digits in field if digits != "*")
    if any("*" in field for field in fields) and isinstance(values, tuple):
        widths += sum(abs(value) for value in values if isinstance(value, int))
    # Each value of a tuple is used once; the values of a mapping as often as they are named.
    times = 1 if isinstance(values, tuple) else len(fields)
    return shallow_size(form) + 4 * widths + times * shown_size(values, limit)


def operator_size(sign: str, left: object, right: object, limit: int) -> int:
    """Bytes that a binary operator makes."""
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            bits = bits * max(right, 1) if sign == "**" else bits + right.bit_length()
            if bits > MAX_BITS:
                raise EndlessError(f"a result of `{sign}` of {bits} bits; at most {MAX_BITS} are allowed")
        return 0
    if sign == "%" and isinstance(left, (str, bytes)):
        return format_size(left, right, limit)
    if sign == "*":
        times, repeated = (left, right) if isinstance(left, int) else (right, left)
        return max(0, times) * shallow_size(repeated) if isinstance(times, int) else 0
    return shallow_size(left) + shallow_size(right)


def filter_size(name: str, value: object, values: Sequence[object], limit: int) -> int:
    """Bytes that a filter of a value and further values reads and makes."""
    if name in _LAZY:
        return STRING * len(value) if isinstance(value, str) and name in ("list", "reverse") else 0
    factor = CHANGED if isinstance(value, str) and name not in _ESCAPING else ESCAPED
    read = factor * _sizes([value, *values], limit // factor)
    rule = _FILTERS.get(name)
    return read if rule is None or read > limit else read + rule(value, values, limit)


def method_size(name: str, owner: object, values: Sequence[object], limit: int) -> int:
    """Bytes that a method of a built-in type reads and makes."""
    if isinstance(owner, dict) and name in ("get", "items", "keys", "values"):
        return 0
    read = CHANGED * _sizes([owner, *values], limit // CHANGED)
    rule = _METHODS.get(name)
    return read if rule is None or read > limit else read + rule(owner, values, limit)


def _sizes(values: Sequence[object], limit: int) -> int:
    return sum(deep_size(value, limit) for value in values)


def _texts(values: Sequence[object]) -> int:
    return sum(shallow_size(value) for value in values if isinstance(value, str))


def _largest(values: Sequence[object]) -> int:
    return max((abs(value) for value in values if isinstance(value, int)), default=0)


def _padded(value: object, values: Sequence[object], limit: int) -> int:
    return 4 * _largest(values)


def _squared(value: object, values: Sequence[object], limit: int) -> int:
    size = deep_size(value, limit)
    return size * (size + _texts(values))


def _searched_backwards(value: object, values: Sequence[object], limit: int) -> int:
    return shallow_size(value) * max(_texts(values), 1)


def _replaced(value: object, values: Sequence[object], limit: int) -> int:
    text, old, new = str(value), *(*map(str, values[:2]), "", "")[:2]
    return int(text.count(old)) * shallow_size(new)


def _split(value: object, values: Sequence[object], limit: int) -> int:
    separator = values[0] if values else None
    if isinstance(value, str) and isinstance(separator, str) and separator:
        return STRING * (1 + value.count(separator))
    if isinstance(value, bytes) and isinstance(separator, bytes) and separator:
        return STRING * (1 + value.count(separator))
    return _split_lines(value, values, limit)


def _split_lines(value: object, values: Sequence[object], limit: int) -> int:
    return STRING * operator.length_hint(value, 0) // 2


def _untabbed(value: object, values: Sequence[object], limit: int) -> int:
    return operator.length_hint(value, 0) * (_largest(values) or 8)


def _indented(value: object, values: Sequence[object], limit: int) -> int:
    return (str(value).count("\n") + 2) * (_largest(values) + _texts(values))


def _json(value: object, values: Sequence[object], limit: int) -> int:
    beside = _largest(values) + _texts(
        [*values, *(text for pair in values if isinstance(pair, tuple) for text in pair)]
    )
    if not beside:
        return 0
    level: list[object] = [value]
    lines, depth = 0, 1
    while level:
        lines, depth = lines + len(level), depth + 1
        inner = ((v._parts if isinstance(v, ContentParts) else v.values() if isinstance(v, dict) else v) for v in level)
        level = [
            item for items in inner if isinstance(items, Iterable) and not isinstance(items, str) for item in items
        ]
    return lines * depth * beside


def _translated(value: object, values: Sequence[object], limit: int) -> int:
    tables = [table.values() for table in values if isinstance(table, dict)]
    return operator.length_hint(value, 0) * max(map(shallow_size, chain(*tables)), default=0)


def _codec(value: object, values: Sequence[object], limit: int) -> int:
    usual = not values or str(values[0]).lower() in ("utf-8", "utf8", "ascii", "latin-1", "utf-16", "utf-32")
    return 0 if usual else shallow_size(value) ** 2


_Rule: TypeAlias = Callable[[object, Sequence[object], int], int]
# Filters whose time does not depend on the length of the value; the lists and iterators that they return are counted.
_LAZY = frozenset(("attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map"))
_LAZY |= {"random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice"}
# Filters that escape.
_ESCAPING = frozenset(("e", "escape", "forceescape", "tojson", "urlencode", "urlize", "xmlattr"))
_FILTERS: dict[str, _Rule] = {
    "center": _padded,
    "round": lambda value, values, limit: _largest(values) ** 2,
    "indent": _indented,
    "wordwrap": lambda value, values, limit: _squared(value, values, limit),
    "urlize": _squared,
    "striptags": _squared,
    "replace": _replaced,
    "join": lambda value, values, limit: operator.length_hint(value, 0) * _sizes(values[:1], limit),
    "tojson": _json,
    "format": lambda value, values, limit: format_size(str(value), tuple(values), limit),
    "pprint": lambda value, values, limit: 50 * deep_size(value, limit),
    "sum": lambda value, values, limit: operator.length_hint(value, 0) * deep_size(value, limit) if values else 0,
}
_METHODS: dict[str, _Rule] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), _padded),
    **dict.fromkeys(("rfind", "rindex", "rpartition", "strip", "lstrip", "rstrip"), _searched_backwards),
    **dict.fromkeys(("encode", "decode"), _codec),
    "split": _split,
    "rsplit": lambda value, values, limit: _split(value, values, limit) + _searched_backwards(value, values, limit),
    "splitlines": _split_lines,
    "replace": _replaced,
    "join": lambda value, values, limit: operator.length_hint(values[0], 0) * shallow_size(value) if values else 0,
    "expandtabs": _untabbed,
    "translate": _translated,
}

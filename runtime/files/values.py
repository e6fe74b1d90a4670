"""Values of JSON and of tables become prompts and candidates; errors name what a value is instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from bonnx.errors import InputError

from ..text.reader import Item
from .strict_json import parse_json

__all__ = [
    "AS_TEXT",
    "begins_as_json",
    "name_of",
    "to_candidate",
    "to_embeddings",
    "to_item",
    "to_prompt",
    "to_value",
]

AS_TEXT = (
    'a line that begins with {, [ or " must be JSON; write text that begins so as a JSON string, or pass --text to '
    "`bonnx rank` or `bonnx generate`, which then read every line as text"
)
_NAMES = {
    bool: "true or false",
    type(None): "null",
    int: "a whole number",
    float: "a number that is not whole",
    str: "text",
    dict: "an object",
    list: "a list",
}


def to_value(text: str, *, literal: bool = False) -> object:
    """The content of a line: a value if it begins as JSON does, else text.

    Args:
        text: text of the line.
        literal: treat the line as text, however it begins.

    Raises:
        InputError: it begins as JSON does and is not JSON.
    """
    if literal or not begins_as_json(text):
        return text
    try:
        return parse_json(text)
    except InputError as e:
        raise InputError(f"{e}; {AS_TEXT}") from e


def to_prompt(value: object) -> Item:
    """A prompt, or an object with it as its `prompt` or `text`.

    Raises:
        InputError: it is no prompt.
    """
    return to_item(_only(value, ("prompt", "text")) if isinstance(value, dict) else value)


def to_candidate(value: object) -> Item:
    """A candidate, or an object with it as its `text`.

    Raises:
        InputError: it is no candidate.
    """
    return to_item(_only(value, ("text",)) if isinstance(value, dict) else value)


def to_item(value: object) -> Item:
    """A value of JSON or of a table's row as `rank` takes it; lists of lists of numbers become embeddings.

    Raises:
        InputError: it cannot be ranked.
    """
    if isinstance(value, str):
        return value
    got = name_of(value)
    if isinstance(value, list):
        kinds = {*map(type, value)}
        # True is no token, though Python counts it among the whole numbers.
        if not kinds or kinds in ({int}, {str}, {dict}):
            return cast(Item, value)
        if kinds == {list}:
            return to_embeddings(value)
        got = f"a list of {' and of '.join(sorted({name_of(part) for part in value}))}"
    raise InputError(f"expected text, token ids, messages, steps as texts, or embeddings as lists; got {got}")


def begins_as_json(text: str) -> bool:
    """Whether a line must be JSON."""
    return text.lstrip()[:1] in ("{", "[", '"')


def to_embeddings(rows: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    """Lists of numbers as float32 embeddings (length, embed_dim).

    Raises:
        InputError: the lists differ in length, hold something else, or a number is out of range.
    """
    if any(type(value) not in (int, float) for row in rows for value in row):
        raise InputError("a list of lists: expected embeddings, rows of numbers")
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        lengths = ", ".join(map(str, sorted(widths)[:5]))
        raise InputError(f"a list of lists: expected embeddings, rows of one length; got {lengths}")
    try:
        with np.errstate(over="raise"):
            return np.array(rows, np.float64).astype(np.float32)
    except (FloatingPointError, OverflowError) as e:
        raise InputError("a number is out of range for float32 embeddings") from e


def _only(value: dict[str, object], names: Sequence[str]) -> object:
    """The one of these fields that an object has."""
    present = [name for name in names if name in value]
    if len(present) != 1:
        has = "both" if present else ", ".join(f"'{name:.40}'" for name in [*value][:8]) or "none"
        wanted = " or ".join(f"'{name}'" for name in names)
        raise InputError(f"expected an object with {wanted}; it has {has}")
    return value[present[0]]


def name_of(value: object) -> str:
    """The words for a value in a message."""
    return _NAMES.get(type(value), type(value).__name__)

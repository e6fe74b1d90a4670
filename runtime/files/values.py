"""What JSON and the rows of tables hold becomes a prompt or a candidate; what is neither is refused by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from ...errors import InputError
from ..text.reader import Item

__all__ = [
    "AS_TEXT",
    "DECODER",
    "begins_as_json",
    "name_of",
    "parse_json",
    "reason",
    "to_candidate",
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


def parse_json(text: str) -> Any:
    """The value that a whole text holds as JSON.

    Raises:
        InputError: it is no JSON, an object has a key twice, or it is nested too deeply.
    """
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as e:
        raise InputError(f"not JSON: {reason(e)}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"not JSON that can be read: {reason(e)}") from e


def reason(error: Exception) -> str:
    """What Python's decoder says, in plain words where it speaks of its own workings."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "a number of thousands of digits" if "int_max_str_digits" in str(error) else str(error)


def to_value(text: str, *, literal: bool = False) -> Any:
    """What a line holds: a value if it begins as JSON does, else text.

    Args:
        text: of the line.
        literal: it is text, however it begins.

    Raises:
        InputError: it begins as JSON does and is none.
    """
    if literal or not begins_as_json(text):
        return text
    try:
        return parse_json(text)
    except InputError as e:
        raise InputError(f"{e}; {AS_TEXT}") from e


def to_prompt(value: Any) -> Item:
    """A prompt, or an object with it as its `prompt` or `text`.

    Raises:
        InputError: it is no prompt.
    """
    item: Item = to_item(_only(value, ("prompt", "text")) if isinstance(value, dict) else value)
    return item


def to_candidate(value: Any) -> Item:
    """A candidate, or an object with it as its `text`.

    Raises:
        InputError: it is no candidate.
    """
    item: Item = to_item(_only(value, ("text",)) if isinstance(value, dict) else value)
    return item


def to_item(value: Any) -> Any:
    """A value of JSON or of a table's row as `rank` takes it; lists of lists of numbers become embeddings.

    Raises:
        InputError: it is none of what can be ranked.
    """
    if isinstance(value, str):
        return value
    got = name_of(value)
    if isinstance(value, list):
        kinds = {*map(type, value)}
        # True is no token, though Python counts it among the whole numbers.
        if not kinds or kinds in ({int}, {str}, {dict}):
            return value
        if kinds == {list}:
            return _embeddings(value)
        got = f"a list of {' and of '.join(sorted({name_of(part) for part in value}))}"
    raise InputError(f"expected text, token ids, messages, steps as texts, or embeddings as lists; got {got}")


def begins_as_json(text: str) -> bool:
    """Whether a line must be JSON."""
    return text.lstrip()[:1] in ("{", "[", '"')


def _embeddings(rows: list[list[Any]]) -> Any:
    """Lists of numbers as float32 (length, embed_dim)."""
    kinds = {type(value) for row in rows for value in row}
    if not kinds <= {int, float} or len({*map(len, rows)}) != 1:
        raise InputError("a list of lists: expected embeddings, lists of equally many numbers")
    try:
        values = np.array(rows, np.float64)
    except OverflowError:
        values = np.array(np.inf)
    if not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise InputError("embeddings: a number is beyond float32")
    return values.astype(np.float32)


def _only(value: dict[str, Any], names: Sequence[str]) -> Any:
    """The one of these fields that an object has."""
    there = [name for name in names if name in value]
    if len(there) != 1:
        has = "both" if there else ", ".join(f"'{name:.40}'" for name in [*value][:8]) or "none"
        wanted = " or ".join(f"'{name}'" for name in names)
        raise InputError(f"expected an object with {wanted}; it has {has}")
    return value[there[0]]


def name_of(value: Any) -> str:
    """What a value is called in a message."""
    return _NAMES.get(type(value), type(value).__name__)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"an object has the key '{key:.40}' twice")
        found[key] = value
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_refuse)

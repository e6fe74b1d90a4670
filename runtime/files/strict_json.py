"""JSON read strictly, for files and HTTP: input that two parsers might read differently is refused.

Refused are an object that has a name twice, NaN and Infinity, and a number that no 64-bit float holds.
"""

from __future__ import annotations

import json
import math
from typing import NoReturn

from bonnx.errors import InputError

__all__ = ["DECODER", "json_error", "parse_json"]


def parse_json(text: str) -> object:
    """The value that a text holds as JSON.

    Raises:
        InputError: it is not JSON, or not JSON that every reader reads in the same way.
    """
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as e:
        raise InputError(f"not JSON: {json_error(e)}") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"not JSON that can be read: {json_error(e)}") from e


def json_error(error: Exception) -> str:
    """An error of `DECODER` in plain words."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "a number of thousands of digits" if "int_max_str_digits" in str(error) else str(error)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value: dict[str, object] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"an object has {name!r:.80} twice; expected it once")
        value[name] = item
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits:.40} is out of range")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)

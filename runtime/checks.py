"""Checks of arguments: a wrong type or value is refused by name, before anything is computed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TypedDict

import numpy as np

from bonnx.errors import InputError

__all__ = [
    "ARGUMENTS",
    "ArgumentNames",
    "Bounds",
    "check_flag",
    "check_function",
    "check_number",
    "check_path",
    "check_some",
    "check_whole",
    "is_list",
    "number_words",
    "shown",
]


@dataclass(frozen=True)
class ArgumentNames:
    """The names that the caller uses for a prompt and its candidates, for errors.

    Attributes:
        prompt: the argument or field that holds the prompt.
        candidates: the one that holds the candidates.
        nouns: the words for a prompt, a candidate and several candidates in a sentence.
        each: a name for each candidate; by default `candidates[0]` and so on.
    """

    prompt: str = "prompt"
    candidates: str = "candidates"
    nouns: tuple[str, str, str] = ("prompt", "candidate", "candidates")
    each: Sequence[str] | None = None

    def candidate(self, i: int) -> str:
        """The name of one candidate."""
        return f"{self.candidates}[{i}]" if self.each is None else self.each[i]


ARGUMENTS = ArgumentNames()


def shown(value: object) -> str:
    """A value as errors show it: its beginning, and its type where that is not evident."""
    plain = value is None or isinstance(value, str | bytes | int | float | complex | np.generic | list | tuple | dict)
    try:
        text = f"{value!r:.60}"
    except ValueError:
        # Python refuses to write integers of thousands of digits.
        text = "a number of thousands of digits"
    return text if plain else f"{type(value).__name__} {text}"


def is_list(value: object) -> bool:
    """Whether a value counts as a list: ordered, of known length, and not text, bytes or a mapping."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview | Mapping)


def check_flag(name: str, value: object) -> None:
    """Refuse anything but True and False.

    Raises:
        InputError: names it.
    """
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name}: expected True or False; got {shown(value)}")


class Bounds(TypedDict, total=False):
    """Bounds of a number, as msgspec and pydantic name them."""

    ge: float | None
    gt: float | None
    le: float | None
    lt: float | None


def number_words(
    noun: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None
) -> str:
    """The words for a number within bounds: `a number of at least 0 and below 1`."""
    bounds = [
        ("of at least", ge),
        ("above", gt),
        ("at most" if (ge, gt) != (None, None) else "of at most", le),
        ("below", lt),
    ]
    parts = [
        f"{word} {bound if isinstance(bound, int) else format(bound, 'g').replace('e+', 'e')}"
        for word, bound in bounds
        if bound is not None and math.isfinite(bound)
    ]
    return f"{noun} {' and '.join(parts)}".rstrip()


def check_number(
    name: str,
    value: object,
    noun: str = "a number",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> None:
    """Refuse anything but a real number within bounds; `noun` is the message's word for such a number.

    Raises:
        InputError: names it.
    """
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.nan
    above = (ge is None or number >= ge) and (gt is None or number > gt)
    below = (le is None or number <= le) and (lt is None or number < lt)
    if math.isnan(number) or not (above and below):
        raise InputError(f"{name}: expected {number_words(noun, ge=ge, gt=gt, le=le, lt=lt)}; got {shown(value)}")


def check_whole(name: str, value: object, least: int, otherwise: str = "", *, bits: int = 63) -> None:
    """Refuse anything but a whole number of at least `least` and below 2^bits; `otherwise` names other valid values.

    Raises:
        InputError: names it.
    """
    upper = ""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if least <= value < 2**bits:
            return
        upper = f" and below 2^{bits}" if value >= 2**bits else ""
    raise InputError(f"{name}: expected a whole number of at least {least}{upper}{otherwise}; got {shown(value)}")


def check_some(items: Sequence[object], name: str) -> None:
    """Refuse anything but a list that is not empty.

    Raises:
        InputError: names `name`.
    """
    if not is_list(items) or not len(items):
        raise InputError(f"{name}: expected a list of at least one {name.removesuffix('s')}; got {shown(items)}")


def check_function(name: str, value: object) -> None:
    """Refuse anything that cannot be called.

    Raises:
        InputError: names it.
    """
    if not callable(value):
        raise InputError(f"{name}: expected a function; got {shown(value)}")


def check_path(name: str, value: object) -> Path:
    """The argument as a path.

    Raises:
        InputError: it is not a path.
    """
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        # No file system allows these in a name.
        if isinstance(path, str) and not any(letter == "\0" or "\ud800" <= letter < "\udc80" for letter in path):
            return Path(path)
    raise InputError(f"{name}: expected a path, as text or a pathlib.Path; got {shown(value)}")

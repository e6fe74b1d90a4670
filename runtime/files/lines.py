"""Files of prompts and candidates: every command reads them in this one way.

A file is UTF-8, with or without a byte order mark. Only a line feed, or a carriage return and a line feed, ends a line.
A line that begins with `{`, `[` or `"` must be JSON; any other line is text as it stands.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from bonnx.errors import InputError

from ..arrays import Array
from ..text.reader import Item
from .strict_json import DECODER, json_error, parse_json
from .values import AS_TEXT, name_of, to_candidate, to_prompt, to_value

__all__ = [
    "check_mark",
    "decode",
    "in_line",
    "load_arrays",
    "numbered_lines",
    "opened",
    "read_candidates",
    "read_prompts",
    "read_values",
]

_MARK = b"\xef\xbb\xbf"
# The mark of UTF-32 begins with that of UTF-16.
_OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_JSON_BLANK = " \t\r"
_SPACE = re.compile(r"[ \t\r\n]*")


@contextlib.contextmanager
def opened(name: str | Path) -> Iterator[IO[bytes]]:
    """A file to read; `-` is standard input.

    Raises:
        InputError: it cannot be opened or read.
    """
    try:
        if name == "-":
            if sys.stdin is None:
                raise InputError("cannot read -: standard input is closed")
            yield sys.stdin.buffer
        else:
            with Path(name).open("rb") as file:
                yield file
    except OSError as e:
        raise InputError(f"cannot read {name}: {e.strerror or e}") from e


def check_mark(beginning: bytes) -> bytes:
    """The beginning of a file without the byte order mark of UTF-8.

    Raises:
        InputError: it has the mark of another encoding.
    """
    for mark, encoding in _OTHER_MARKS.items():
        if beginning.startswith(mark):
            raise InputError(f"it is {encoding}; expected UTF-8: convert it first, with `iconv -f {encoding} -t UTF-8`")
    return beginning.removeprefix(_MARK)


def numbered_lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines, without their ends, and their numbers from 1.

    Raises:
        InputError: the file is in another encoding.
    """
    for number, line in enumerate(file, 1):
        text = check_mark(line) if number == 1 else line
        if line and not text:
            return  # nothing but a mark
        if text.endswith(b"\n"):
            text = text[:-1].removesuffix(b"\r")
        yield number, text


def decode(line: bytes) -> str:
    """The text of a line.

    Raises:
        InputError: it is not UTF-8, or bytes in it show that the file is in another encoding.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as e:
        raise InputError(f"not UTF-8: {e.reason} (0x{line[e.start]:02x}) at byte {e.start} of the line") from e
    if "\0" in text:
        raise InputError("it holds a NUL byte, as UTF-16 does; expected UTF-8 (in JSON write it as \\u0000)")
    if text.startswith("\ufeff"):
        raise InputError("a byte order mark in the middle of the file; remove it")
    return text


def read_values(name: str | Path, *, literal: bool = False) -> Iterator[tuple[int, object]]:
    """The content of each line of a file, a value of JSON or text, with the line's number. Blank lines are skipped.

    Args:
        name: name of the file; `-` is standard input.
        literal: every line is text.

    Returns:
        for a line that cannot be read the `InputError` that says why.

    Raises:
        InputError: the file cannot be read, or is in another encoding.
    """
    with opened(name) as file:
        for number, line in _named(name, numbered_lines(file)):
            try:
                text = decode(line)
                if text.strip(_JSON_BLANK):
                    yield number, to_value(text, literal=literal)
            except InputError as e:
                yield number, e


def read_prompts(name: str | Path, *, literal: bool = False) -> Iterator[tuple[int, Item | InputError]]:
    """The prompts of a file, one a line; the rest is as in `read_values`."""
    for number, value in read_values(name, literal=literal):
        try:
            with in_line(name, number):
                if isinstance(value, InputError):
                    raise value
                prompt = to_prompt(value)
        except InputError as e:
            yield number, e
        else:
            yield number, prompt


def read_candidates(name: str | Path, *, literal: bool = False) -> list[Item]:
    """The candidates of a file: one a line, or one JSON list of all. An empty line is an empty candidate.

    Args:
        name: name of the file; `-` is standard input.
        literal: every line is text.

    Raises:
        InputError: something cannot be read; the message says in which line.
    """
    with opened(name) as file:
        numbered = [*_named(name, numbered_lines(file))]
    texts: list[str] = []
    for number, line in numbered:
        with in_line(name, number):
            texts.append(decode(line))
    if not literal and _is_document(texts):
        return _document("\n".join(texts), name)
    candidates = []
    for number, text in enumerate(texts, 1):
        with in_line(name, number):
            candidates.append(to_candidate(to_value(text, literal=literal)))
    return candidates


def load_arrays(path: Path) -> Array | dict[str, Array]:
    """An array (.npy), or a mapping from names to arrays (.npz).

    Raises:
        InputError: the file holds no arrays that can be read.
    """
    try:
        with path.open("rb") as file:
            loaded: Array | np.lib.npyio.NpzFile = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return loaded
            return {name: loaded[name] for name in loaded.files}
    except Exception as e:  # NumPy and the modules below it raise many kinds of errors for a file of another format
        raise InputError(f"cannot read {path} as numpy arrays: {e}") from e


def _is_document(texts: Sequence[str]) -> bool:
    """Whether lines are one JSON list together: the first that is not blank is no whole value, or is the only one."""
    filled = [text for text in texts if text.strip(_JSON_BLANK)]
    if not filled or not filled[0].lstrip().startswith("["):
        return False
    if len(filled) == 1:
        return True
    try:
        parse_json(filled[0])
    except InputError:
        return True
    return False


def _document(text: str, name: str | Path) -> list[Item]:
    """The elements of one JSON list, each a candidate."""
    try:
        json.loads(text)
    except json.JSONDecodeError as e:
        with in_line(name, e.lineno):
            raise InputError(f"not JSON: {json_error(e)}; {AS_TEXT}") from e
    except (ValueError, RecursionError):
        # An error without a place is raised again below, for its element.
        pass
    candidates: list[Item] = []
    at = _after_space(text, _after_space(text, 0) + 1)
    while not text.startswith("]", at):
        with in_line(name, text.count("\n", 0, at) + 1):
            try:
                value, at = DECODER.raw_decode(text, at)
            except (ValueError, RecursionError) as e:
                raise InputError(f"not JSON that can be read: {json_error(e)}") from e
            if isinstance(value, int | float | bool | None):
                raise InputError(
                    f"expected a JSON list of candidates; its element {len(candidates)} is {name_of(value)} (the token "
                    "ids of a single candidate are [[1, 2, 3]])"
                )
            candidates.append(to_candidate(value))
        at = _after_space(text, at)
        if text.startswith(",", at):
            at = _after_space(text, at + 1)
    return candidates


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


@contextlib.contextmanager
def in_line(name: str | Path, number: int) -> Iterator[None]:
    """Add the name of the file and the line to errors."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{name}, line {number}: {e}") from e


def _named(name: str | Path, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    try:
        yield from lines
    except InputError as e:
        raise InputError(f"{name}: {e}") from e

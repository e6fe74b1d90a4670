"""Rows to rank, in chunks: JSON lines by byte range, Parquet by rows of one row group.

A chunk can be read again, here or in another process, and holds the same rows: that is what a run resumes by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bonnx.errors import InputError

from ..files.lines import check_mark, decode, opened
from ..files.strict_json import parse_json
from ..files.values import name_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Chunk", "JsonLines", "Part", "Row", "Source"]

# A chunk ends after this many bytes, however few its rows: it is held in memory.
_CHUNK_BYTES = 8 * 2**20
_BLOCK = 2**20
# White space of JSON; anything else between values is an error.
_SPACE = b" \t\r\n"


@dataclass(frozen=True)
class Chunk:
    """A part of the input.

    Attributes:
        number: 0, 1, ...
        first: line number of its first row, from 1; of Parquet the row's number.
        group: row group, of Parquet.
        start: byte offset, or offset in the row group.
        stop: the same of its end.
        done: share of the input that is done with it, 0 to 1.
    """

    number: int
    first: int
    group: int
    start: int
    stop: int
    done: float


@dataclass(frozen=True)
class Row:
    """One row, or the reason why it cannot be read.

    Attributes:
        line: number of its line, or of its row, from 1.
        values: its fields; of Parquet those that are needed.
        reason: why it cannot be read, if it cannot.
        text: of JSON, as it stands in the file.
    """

    line: int
    values: dict[str, object] | None
    reason: str | None = None
    text: bytes = b""


@dataclass(frozen=True)
class Part:
    """The rows of a chunk; for Parquet also an Arrow table of them with every column."""

    rows: list[Row]
    table: pa.Table | None = None


class Source(Protocol):
    """An input file."""

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """All chunks, of at most this many rows each."""
        ...

    def read(self, chunk: Chunk) -> Part:
        """The rows of a chunk."""
        ...


class JsonLines:
    """One JSON object a line.

    Raises:
        InputError: the file cannot be read, or is in another encoding.
    """

    def __init__(self, path: Path, max_line: int) -> None:
        self._path, self._max_line = path, max_line
        with opened(path) as file:
            self._size = path.stat().st_size
            beginning = file.read(4)
        try:
            self._mark = len(beginning) - len(check_mark(beginning))
        except InputError as e:
            raise InputError(f"{path}: {e}") from e

    def chunks(self, rows: int) -> Iterator[Chunk]:
        number, line, first, start, place = 0, 1, 1, 0, 0
        with opened(self._path) as file:
            while block := file.read(_BLOCK):
                at = -1
                while (at := block.find(b"\n", at + 1)) >= 0:
                    line += 1
                    if line - first == rows or place + at + 1 - start >= _CHUNK_BYTES:
                        stop = place + at + 1
                        yield Chunk(number, first, 0, start, stop, stop / self._size)
                        number, first, start = number + 1, line, stop
                place += len(block)
        if start < place:
            yield Chunk(number, first, 0, start, place, 1.0)

    def read(self, chunk: Chunk) -> Part:
        rows, line = [], chunk.first
        with opened(self._path) as file:
            file.seek(chunk.start or self._mark)
            while file.tell() < chunk.stop:
                text = file.readline(self._max_line + 1)
                if len(text) > self._max_line and not text.endswith(b"\n"):
                    while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
                        pass
                    rows.append(Row(line, None, f"a line of more than {self._max_line} bytes; see --max-line"))
                elif text := text.strip(_SPACE):
                    rows.append(_parse(line, text))
                line += 1
        return Part(rows)


def _parse(line: int, text: bytes) -> Row:
    try:
        values = parse_json(decode(text))
    except InputError as e:
        return Row(line, None, str(e))
    if not isinstance(values, dict):
        return Row(line, None, f"expected a JSON object; got {name_of(values)}")
    return Row(line, values, text=text)

"""Rows to rank, in chunks: JSON lines by byte range, Parquet by rows of one row group.

A chunk can be read again, here or in another process, and holds the same rows: that is what a run resumes by.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError

__all__ = ["Chunk", "JsonLines", "Parquet", "Row", "Source", "open_source"]

# A chunk ends after so many bytes, however few its rows: it is held in memory.
_CHUNK_BYTES = 8 * 2**20
_BLOCK = 2**20


@dataclass(frozen=True)
class Chunk:
    """A part of the input.

    Attributes:
        number: 0, 1, ...
        first: line number of its first row, from 1; of Parquet the row's number.
        group: row group, of Parquet.
        start: byte offset, or offset in the row group.
        stop: behind its end, likewise.
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
    """One row, or the reason why it is none."""

    line: int
    values: dict[str, Any] | None
    reason: str | None = None


class Source(Protocol):
    """An input file."""

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """All of it, at most so many rows each."""
        ...

    def read(self, chunk: Chunk) -> list[Row]:
        """The rows of a chunk."""
        ...


class JsonLines:
    """One JSON object a line."""

    def __init__(self, path: Path, max_line: int) -> None:
        self._path, self._max_line = path, max_line
        self._size = path.stat().st_size

    def chunks(self, rows: int) -> Iterator[Chunk]:
        number, line, first, start, place = 0, 1, 1, 0, 0
        with self._path.open("rb") as file:
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

    def read(self, chunk: Chunk) -> list[Row]:
        rows, line = [], chunk.first
        with self._path.open("rb") as file:
            file.seek(chunk.start)
            while file.tell() < chunk.stop:
                text = file.readline(self._max_line + 1)
                if len(text) > self._max_line and not text.endswith(b"\n"):
                    while (rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
                        pass
                    rows.append(Row(line, None, f"a line of more than {self._max_line} bytes; see --max-line"))
                elif text.strip():
                    rows.append(_parse(line, text))
                line += 1
        return rows


def _parse(line: int, text: bytes) -> Row:
    try:
        values = json.loads(text.decode(), parse_constant=_refuse)
    except UnicodeDecodeError as e:
        return Row(line, None, f"not UTF-8: {e.reason} at byte {e.start}")
    except (ValueError, RecursionError) as e:
        return Row(line, None, f"not JSON: {e}")
    if not isinstance(values, dict):
        return Row(line, None, f"expected a JSON object; got {type(values).__name__}")
    return Row(line, values)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


class Parquet:
    """A Parquet file; one row group is held in memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            self.file: Any = parquet.ParquetFile(path)
        except (OSError, pa.ArrowException) as e:
            raise InputError(f"{path}: cannot be read as Parquet: {e}") from e
        self.schema: Any = self.file.schema_arrow
        self._held: tuple[int, Any] = (-1, None)

    def chunks(self, rows: int) -> Iterator[Chunk]:
        total, number, first = self.file.metadata.num_rows, 0, 1
        if not total:
            # The output has the columns all the same.
            yield Chunk(0, 1, -1, 0, 0, 1.0)
        for group in range(self.file.metadata.num_row_groups):
            size = self.file.metadata.row_group(group).num_rows
            for start in range(0, size, rows):
                stop = min(size, start + rows)
                yield Chunk(number, first, group, start, stop, (first + stop - start - 1) / total)
                number, first = number + 1, first + stop - start

    def table(self, chunk: Chunk) -> Any:
        """The chunk's rows as an Arrow table."""
        if chunk.group < 0:
            return self.schema.empty_table()
        if self._held[0] != chunk.group:
            self._held = (chunk.group, self.file.read_row_group(chunk.group))
        return self._held[1].slice(chunk.start, chunk.stop - chunk.start)

    def read(self, chunk: Chunk) -> list[Row]:
        rows = self.table(chunk).to_pylist()
        return [Row(chunk.first + i, values) for i, values in enumerate(rows)]


def open_source(path: Path, max_line: int) -> Source:
    """The input, by its name's ending.

    Raises:
        InputError: there is no such file, or it is of another kind.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    if path.suffix == ".parquet":
        return Parquet(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return JsonLines(path, max_line)
    raise InputError(f"{path}: expected a name that ends with .jsonl, .ndjson or .parquet")

"""Parquet: rows are read from it, ranked rows are written as they were with new columns, and parts become one file."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from bonnx.errors import InputError

from .source import Chunk, Part, Row

if TYPE_CHECKING:
    import pyarrow as arrow

__all__ = ["Parquet", "join"]


class Parquet:
    """A Parquet file; one row group is held in memory. Read it in one thread.

    Args:
        path: the file.
        columns: names of the columns whose values are needed.
        best: name of the column whose elements the new column `best` has.
        new: names of the columns that ranked rows get.

    Raises:
        InputError: it cannot be read, or its columns cannot be ranked or written.
    """

    def __init__(self, path: Path, columns: Sequence[str], best: str, new: Sequence[str]) -> None:
        pa, parquet = _pyarrow()
        self._path, self._columns, self._new = path, [*dict.fromkeys(columns)], new
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, pa.ArrowException) as e:
            raise InputError(f"{path}: cannot be read as Parquet: {e}") from e
        self.schema: arrow.Schema = self._file.schema_arrow
        self._held: tuple[int, arrow.Table | None] = (-1, None)
        self._check_names()
        kind = self.schema.field(best).type
        floats = pa.list_(pa.float32())
        self._types = {
            "best_index": pa.int64(),
            # Rows of a column that holds no lists are refused one by one.
            "best": getattr(kind, "value_type", None) or pa.null(),
            "candidate_scores": floats,
            "margin": pa.float64(),
            "scores": pa.list_(floats),
        }
        # Refused now, and not when rows have been ranked.
        self.write(self.schema.empty_table(), [], [])

    def chunks(self, rows: int) -> Iterator[Chunk]:
        total, number, first = self._file.metadata.num_rows, 0, 1
        if not total:
            # The output has the columns all the same.
            yield Chunk(0, 1, -1, 0, 0, 1.0)
        for group in range(self._file.metadata.num_row_groups):
            size = self._file.metadata.row_group(group).num_rows
            for start in range(0, size, rows):
                stop = min(size, start + rows)
                yield Chunk(number, first, group, start, stop, (first + stop - start - 1) / total)
                number, first = number + 1, first + stop - start

    def read(self, chunk: Chunk) -> Part:
        table = self._table(chunk)
        needed = table.select(self._columns)
        try:
            rows = [Row(chunk.first + i, values) for i, values in enumerate(needed.to_pylist())]
        except Exception:  # Arrow raises errors of many kinds for what Python cannot hold
            rows = [_row(needed, i, chunk.first + i) for i in range(len(needed))]
        return Part(rows, table)

    def write(self, table: arrow.Table, places: Sequence[int], added: Sequence[Mapping[str, object]]) -> bytes:
        """The rows at these places, in rising order, with the new columns, as a Parquet file.

        Raises:
            InputError: pyarrow cannot write a column of such a type.
        """
        pa, parquet = _pyarrow()
        buffer = io.BytesIO()
        try:
            kept = _pick(table, places)
            for name in self._new:
                kept = kept.append_column(name, pa.array([row[name] for row in added], self._types[name]))
            parquet.write_table(kept, buffer)
        except pa.ArrowException as e:
            raise InputError(f"{self._path}: a column of its types cannot be written: {e}; leave it out") from e
        return buffer.getvalue()

    def _check_names(self) -> None:
        names = self.schema.names
        for name in self._columns:
            if name not in names:
                raise InputError(
                    f"{self._path}: it has no column '{name}', only {', '.join(names)}; name the columns with "
                    "--prompt-field, --candidates-field and --answers-field"
                )
            if names.count(name) > 1:
                raise InputError(
                    f"{self._path}: it has {names.count(name)} columns '{name}'; expected one: rename them"
                )
        clash = [name for name in self._new if name in names]
        if clash:
            raise InputError(f"{self._path}: it has a column '{clash[0]}' already; rename it")

    def _table(self, chunk: Chunk) -> arrow.Table:
        """The chunk's rows, every column."""
        pa, _ = _pyarrow()
        if chunk.group < 0:
            return self.schema.empty_table()
        held, table = self._held
        if held != chunk.group or table is None:
            try:
                table = self._file.read_row_group(chunk.group)
            except (OSError, pa.ArrowException) as e:
                raise InputError(f"{self._path}: row group {chunk.group} cannot be read: {e}") from e
            self._held = (chunk.group, table)
        return table.slice(chunk.start, chunk.stop - chunk.start)


def join(parts: Sequence[Path], path: Path) -> None:
    """One Parquet file of many, a part at a time; on the disk when this returns."""
    _, parquet = _pyarrow()
    with contextlib.ExitStack() as stack:
        writer = None
        for part in parts:
            # Not `read_table`, which would add columns by the names of folders and refuse two of one name.
            table = stack.enter_context(parquet.ParquetFile(part)).read()
            if writer is None:
                writer = stack.enter_context(parquet.ParquetWriter(path, table.schema))
            writer.write_table(table)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _pick(table: arrow.Table, places: Sequence[int]) -> arrow.Table:
    """The rows at these places. `Table.take` cannot take every type that a file can hold; slices can."""
    pa, _ = _pyarrow()
    runs: list[list[int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    return pa.concat_tables([table.slice(start, stop - start) for start, stop in runs] or [table.slice(0, 0)])


def _row(table: arrow.Table, place: int, line: int) -> Row:
    try:
        return Row(line, table.slice(place, 1).to_pylist()[0])
    except Exception as e:
        return Row(line, None, f"it cannot be read: {type(e).__name__}: {e}")


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    """pyarrow and its Parquet.

    Raises:
        InputError: it is missing or broken.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise InputError(
            f"Parquet needs pyarrow, and it cannot be loaded ({e}); run `pip install bonnx[parquet]`"
        ) from e
    return pyarrow, parquet

"""A chunk of rows becomes a chunk of output: the same bytes whenever and wherever it is done."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BonnxError, InputError
from ..jobs import Job
from ..model import Model, load
from ..ranking import Ranking
from .source import Chunk, Parquet, Row, Source, open_source

__all__ = ["ADDED", "Result", "Task", "Worker", "added"]

# What a row gets, and with `--token-scores` also `scores`.
ADDED = ("best_index", "best", "candidate_scores", "margin")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to do with each row.

    Attributes:
        artifact: its folder.
        source: the input file.
        prompt: name of the field with the prompt.
        candidates: of the field with the candidates.
        answers: of the field with what each candidate votes for; None for none.
        token_scores: whether to add the score of every token.
        options: of `Model.rank`: `aggregation`, `vote`, `answers`, `partial`, `truncate`.
        max_line: bytes.
        provider: see `bonnx.load`.
        threads: of one run.
    """

    artifact: str
    source: str
    prompt: str = "prompt"
    candidates: str = "candidates"
    answers: str | None = None
    token_scores: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    max_line: int = 16 * 2**20
    provider: str = "auto"
    threads: int | None = None

    def open(self) -> Source:
        """The input.

        Raises:
            InputError: it cannot be read, or its columns cannot be ranked.
        """
        source = open_source(Path(self.source), self.max_line)
        if isinstance(source, Parquet):
            names = source.schema.names
            for name in (self.prompt, self.candidates, *([] if self.answers is None else [self.answers])):
                if name not in names:
                    raise InputError(f"{self.source}: it has no column '{name}', only {', '.join(names)}")
            clash = [name for name in self.names if name in names]
            if clash:
                raise InputError(f"{self.source}: it has a column '{clash[0]}' already; rename it")
        return source

    @property
    def names(self) -> tuple[str, ...]:
        """Of the fields that a row gets."""
        return (*ADDED, "scores") if self.token_scores else ADDED


@dataclass(frozen=True)
class Result:
    """What became of a chunk.

    Attributes:
        number: the chunk's.
        rows: how many were ranked.
        bad: how many were not.
        output: JSON lines, or a Parquet file.
        errors: JSON lines.
    """

    number: int
    rows: int
    bad: int
    output: bytes
    errors: bytes


class Worker:
    """Does chunks, one after another, with a model of its own."""

    def __init__(self, task: Task, model: Model | None = None) -> None:
        self.task, self._source = task, task.open()
        self._model = model or load(task.artifact, provider=task.provider, threads=task.threads)  # type: ignore[arg-type]

    def read(self, chunk: Chunk) -> tuple[Chunk, list[Row], list[Job | str | None]]:
        """The chunk's rows, and for each what is to be ranked, or why it cannot be."""
        rows = self._source.read(chunk)
        return chunk, rows, [self._job(row) for row in rows]

    def rank(self, chunk: Chunk, rows: Sequence[Row], jobs: Sequence[Job | str | None]) -> Result:
        """Rank what was read."""
        good = [i for i, job in enumerate(jobs) if isinstance(job, Job)]
        found = dict(zip(good, self._model.rank_all([job for job in jobs if isinstance(job, Job)]), strict=True))
        errors, ranked, places = [], [], []
        for i, (row, job) in enumerate(zip(rows, jobs, strict=True)):
            ranking = found.get(i)
            if isinstance(ranking, Ranking):
                ranked.append((row, ranking))
                places.append(i)
            else:
                reason = str(ranking) if ranking is not None else job
                errors.append(_line({"line": row.line, "reason": reason}))
        if isinstance(self._source, Parquet):
            output = self._table(self._source.table(chunk), places, [ranking for _, ranking in ranked])
        else:
            output = b"".join(_line((row.values or {}) | added(ranking, self.task.names)) for row, ranking in ranked)
        return Result(chunk.number, len(ranked), len(errors), output, b"".join(errors))

    def __call__(self, chunk: Chunk) -> Result:
        return self.rank(*self.read(chunk))

    def _job(self, row: Row) -> Job | str | None:
        values, task = row.values, self.task
        if values is None:
            return row.reason
        for name in (task.prompt, task.candidates):
            if values.get(name) is None:
                return f"it has no '{name}'"
        if not isinstance(values[task.candidates], list):
            return f"'{task.candidates}': expected a list; got {type(values[task.candidates]).__name__}"
        clash = [name for name in task.names if name in values]
        if clash:
            return f"it has a field '{clash[0]}' already; rename it"
        options = dict(task.options)
        if task.answers is not None:
            options["answers"] = values.get(task.answers)
            if not isinstance(options["answers"], list):
                return f"'{task.answers}': expected a list, an answer or null for each candidate"
        try:
            return self._model.job(_item(values[task.prompt]), [*map(_item, values[task.candidates])], **options)
        except BonnxError as e:
            return str(e)
        except (TypeError, ValueError, OverflowError) as e:
            # What JSON can hold is more than what a prompt can be: numpy says so in its own words.
            return f"it cannot be read: {e}"

    def _table(self, table: Any, places: list[int], rankings: list[Ranking]) -> bytes:
        """The ranked rows with their new columns, as a Parquet file."""
        import pyarrow as pa
        from pyarrow import parquet

        kept = table.take(pa.array(places, pa.int64()))
        item = table.schema.field(self.task.candidates).type.value_type
        floats = pa.list_(pa.float32())
        types = {"best_index": pa.int64(), "best": item, "candidate_scores": floats, "margin": pa.float64()}
        types["scores"] = pa.list_(floats)
        columns = [added(ranking, self.task.names) for ranking in rankings]
        for name in self.task.names:
            kept = kept.append_column(name, pa.array([column[name] for column in columns], types[name]))
        buffer = io.BytesIO()
        parquet.write_table(kept, buffer)
        return buffer.getvalue()


def added(ranking: Ranking, names: Sequence[str]) -> dict[str, Any]:
    """What a row gets, as JSON has it: null for NaN."""
    best: Any = ranking.best
    found = {
        "best_index": ranking.best_index,
        "best": best.tolist() if isinstance(best, np.ndarray) else best,
        "candidate_scores": _finite(ranking.candidate_scores),
        "margin": None if ranking.margin is None or not math.isfinite(ranking.margin) else ranking.margin,
        "scores": [_finite(scores) for scores in ranking.scores] if "scores" in names else None,
    }
    return {name: found[name] for name in names}


def _finite(scores: Any) -> list[float | None]:
    return [float(score) if math.isfinite(score) else None for score in scores]


def _item(value: Any) -> Any:
    """Embeddings come as lists of lists."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return np.array(value, np.float32)
    return value


def _line(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        # Half of a surrogate pair, which JSON can hold and UTF-8 cannot.
        return json.dumps(value, allow_nan=False).encode() + b"\n"

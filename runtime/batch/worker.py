"""A chunk of rows becomes a chunk of output: the same bytes whenever and wherever it is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bonnx.errors import BonnxError, InputError

from ..checks import ArgumentNames
from ..engine.engine import Engine, open_engine
from ..files.values import name_of, to_candidate, to_item
from ..rank.request import RankRequest, read_request
from ..rank.result import Ranking
from ..rank.run import rank_all
from ..results import to_json
from .source import Chunk, JsonLines, Part, Row, Source
from .tables import Parquet

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
        """The input, by its name's ending.

        Raises:
            InputError: it cannot be read, or its columns cannot be ranked.
        """
        path = Path(self.source)
        if path.is_dir():
            raise InputError(f"{path}: it is a folder; expected a file")
        if not path.exists():
            raise InputError(f"{path}: there is no such file")
        if not path.is_file():
            raise InputError(f"{path}: it is no regular file; a batch reads its input twice: write it to a file first")
        if path.suffix == ".parquet":
            needed = (self.prompt, self.candidates, *([] if self.answers is None else [self.answers]))
            return Parquet(path, needed, self.candidates, self.names)
        if path.suffix in (".jsonl", ".ndjson"):
            return JsonLines(path, self.max_line)
        raise InputError(f"{path}: expected a name that ends with .jsonl, .ndjson or .parquet")

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
    """Does chunks, one after another, with an engine of its own."""

    def __init__(self, task: Task, engine: Engine | None = None) -> None:
        self.task, self._source = task, task.open()
        self._engine = engine or open_engine(task.artifact, provider=task.provider, threads=task.threads)  # type: ignore[arg-type]

    def read(self, chunk: Chunk) -> tuple[Chunk, Part, list[RankRequest | str]]:
        """The chunk's rows, and for each what is to be ranked, or why it cannot be."""
        part = self._source.read(chunk)
        return chunk, part, [self._job(row) for row in part.rows]

    def rank(self, chunk: Chunk, part: Part, jobs: Sequence[RankRequest | str]) -> Result:
        """Rank what was read."""
        rankings = iter(self._ranked([job for job in jobs if isinstance(job, RankRequest)]))
        errors, rows, places, columns = [], [], [], []
        for i, (row, job) in enumerate(zip(part.rows, jobs, strict=True)):
            found = next(rankings) if isinstance(job, RankRequest) else job
            if isinstance(found, Ranking):
                assert row.values is not None
                rows.append(row)
                places.append(i)
                own = row.values[self.task.candidates][found.best_index]
                columns.append(added(found, own, self.task.names))
            else:
                errors.append(_line({"line": row.line, "reason": str(found)}))
        if isinstance(self._source, Parquet):
            output = self._source.write(part.table, places, columns)
        else:
            output = b"".join(_joined(row.text, found) for row, found in zip(rows, columns, strict=True))
        return Result(chunk.number, len(places), len(errors), output, b"".join(errors))

    def __call__(self, chunk: Chunk) -> Result:
        return self.rank(*self.read(chunk))

    def _ranked(self, jobs: Sequence[RankRequest]) -> list[Ranking | Exception]:
        """What became of each; where a joint run fails each runs alone, so that one job cannot end the others."""
        try:
            return [*rank_all(self._engine, jobs)]
        except BonnxError:
            # The artifact or the machine, and no row: what is left is done at the next start.
            raise
        except Exception as failure:  # ONNX Runtime raises bare subclasses of Exception of its own
            found = [self._alone(job) for job in jobs]
            if len(jobs) > 1 and not any(isinstance(ranking, Ranking) for ranking in found):
                raise BonnxError(f"ONNX Runtime cannot go on: {failure}; nothing is lost: start again") from failure
            return found

    def _alone(self, job: RankRequest) -> Ranking | Exception:
        try:
            return rank_all(self._engine, [job])[0]
        except Exception as e:
            return BonnxError(f"ONNX Runtime cannot rank it: {e}")

    def _job(self, row: Row) -> RankRequest | str:
        if row.values is None:
            return row.reason or "it cannot be read"
        try:
            return self._checked(row.values)
        except BonnxError as e:
            return str(e)
        except Exception as e:  # no row may end a run, whatever a template or a tokenizer makes of it
            return f"it cannot be read: {type(e).__name__}: {e}"

    def _checked(self, values: dict[str, Any]) -> RankRequest:
        """What is to be ranked.

        Raises:
            InputError: the row is not one that can be.
        """
        task = self.task
        wanted = {"--prompt-field": task.prompt, "--candidates-field": task.candidates, "--answers-field": task.answers}
        for option, name in wanted.items():
            if name is None:
                continue
            if name not in values:
                fields = ", ".join(f"'{field:.40}'" for field in [*values][:8])
                only = f"only {fields}; name the field with {option}" if fields else "nor any other field"
                raise InputError(f"it has no '{name}', {only}")
            if values[name] is None:
                raise InputError(f"its '{name}' is null")
        clash = [name for name in task.names if name in values]
        if clash:
            raise InputError(f"it has a field '{clash[0]}' already; rename it")
        options = dict(task.options)
        if task.answers is not None:
            options["answers"] = _listed(values[task.answers], task.answers)
        candidates = [
            _named(to_candidate, candidate, f"'{task.candidates}', element {i}")
            for i, candidate in enumerate(_listed(values[task.candidates], task.candidates))
        ]
        prompt = _named(to_item, values[task.prompt], f"'{task.prompt}'")
        names = ArgumentNames(task.prompt, task.candidates)
        return read_request(self._engine, prompt, candidates, **options, names=names)


def added(ranking: Ranking, best: Any, names: Sequence[str]) -> dict[str, Any]:
    """What a row gets, as JSON has it: null for NaN. `best` is the row's own candidate that won."""
    found = {
        "best_index": ranking.best_index,
        "best": best,
        "candidate_scores": to_json(ranking.candidate_scores),
        "margin": to_json(ranking.margin),
        "scores": to_json(ranking.scores) if "scores" in names else None,
    }
    return {name: found[name] for name in names}


def _listed(value: Any, name: str) -> list[Any]:
    if isinstance(value, list):
        return value
    got = f"{name_of(value)} that holds JSON: parse it first" if _holds_list(value) else name_of(value)
    raise InputError(f"'{name}': expected a list, with an element for each candidate; got {got}")


def _holds_list(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[")


def _named(read: Callable[[Any], Any], value: Any, name: str) -> Any:
    try:
        return read(value)
    except InputError as e:
        raise InputError(f"{name}: {e}") from e


def _joined(text: bytes, found: dict[str, Any]) -> bytes:
    """A row as it stands in its file, so that every digit of its fields stays, with what it gets at its end."""
    return text[:-1].rstrip() + b", " + _line(found)[1:]


def _line(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        # Half of a surrogate pair, which JSON can hold and UTF-8 cannot.
        return json.dumps(value, allow_nan=False).encode() + b"\n"

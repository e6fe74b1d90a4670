"""A chunk of rows becomes a chunk of output: the same bytes at any time and in any process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

from bonnx.errors import BonnxError, InputError

from ..checks import ArgumentNames
from ..engine.engine import Engine, open_engine
from ..engine.session import Provider
from ..files.values import name_of, to_candidate, to_item
from ..rank.request import RankOptions, RankRequest, read_request
from ..rank.result import Ranking
from ..rank.run import rank_all
from ..results import to_json
from ..selection.vote import Answers
from .source import Chunk, JsonLines, Part, Row, Source
from .tables import Parquet

T = TypeVar("T")

__all__ = ["ADDED", "ChunkResult", "Task", "Worker", "added"]

# The fields that a row gets; with `--token-scores` also `scores`.
ADDED = ("best_index", "best", "candidate_scores", "margin")


@dataclass(frozen=True, kw_only=True)
class Task:
    """The settings of a run: how each row is ranked.

    Attributes:
        artifact: folder of the artifact.
        source: the input file.
        prompt: name of the field with the prompt.
        candidates: name of the field with the candidates.
        answers: name of the field with the answer of each candidate; None for no such field.
        token_scores: whether to add the score of every token.
        options: options of `Model.rank`: `aggregation`, `vote`, `answers`, `partial`, `truncate`, `instruction`.
        max_line: maximum length of a line in bytes.
        provider: see `bonnx.load`.
        threads: threads of one run.
        cache_dir: see `bonnx.load`.
    """

    artifact: str
    source: str
    prompt: str = "prompt"
    candidates: str = "candidates"
    answers: str | None = None
    token_scores: bool = False
    options: RankOptions = field(default_factory=RankOptions)
    max_line: int = 16 * 2**20
    provider: Provider = "auto"
    threads: int | None = None
    cache_dir: str | None = None

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
        """Names of the fields that a row gets."""
        return (*ADDED, "scores") if self.token_scores else ADDED


@dataclass(frozen=True)
class ChunkResult:
    """The outcome of a chunk.

    Attributes:
        number: number of the chunk.
        rows: number of rows that were ranked.
        bad: number of rows that were not.
        output: JSON lines, or a Parquet file.
        errors: JSON lines.
    """

    number: int
    rows: int
    bad: int
    output: bytes
    errors: bytes


class Worker:
    """Ranks chunks, one after another, with an engine of its own."""

    def __init__(self, task: Task, engine: Engine | None = None) -> None:
        self.task, self._source = task, task.open()
        self._engine = engine or open_engine(
            task.artifact, provider=task.provider, threads=task.threads, cache_dir=task.cache_dir
        )
        self._engine.check_scorer("ranking")

    def read(self, chunk: Chunk) -> tuple[Chunk, Part, list[RankRequest | str]]:
        """The chunk's rows, and for each what is to be ranked, or why it cannot be."""
        part = self._source.read(chunk)
        return chunk, part, [self._request(row) for row in part.rows]

    def rank(self, chunk: Chunk, part: Part, requests: Sequence[RankRequest | str]) -> ChunkResult:
        """Rank what was read."""
        outcomes = iter(self._rank_all([request for request in requests if isinstance(request, RankRequest)]))
        errors, rows, places, new_fields = [], [], [], []
        for i, (row, request) in enumerate(zip(part.rows, requests, strict=True)):
            outcome = next(outcomes) if isinstance(request, RankRequest) else request
            if isinstance(outcome, Ranking):
                assert row.values is not None
                rows.append(row)
                places.append(i)
                best = _listed(row.values[self.task.candidates], self.task.candidates)[outcome.best_index]
                new_fields.append(added(outcome, best, self.task.names))
            else:
                errors.append(_line({"line": row.line, "reason": str(outcome)}))
        if isinstance(self._source, Parquet):
            output = self._source.write(part.table, places, new_fields)
        else:
            output = b"".join(_joined(row.text, fields) for row, fields in zip(rows, new_fields, strict=True))
        return ChunkResult(chunk.number, len(places), len(errors), output, b"".join(errors))

    def __call__(self, chunk: Chunk) -> ChunkResult:
        return self.rank(*self.read(chunk))

    def _rank_all(self, requests: Sequence[RankRequest]) -> list[Ranking | Exception]:
        """The outcome of each; where a joint run fails each runs alone, so that one request cannot end the others."""
        try:
            return [*rank_all(self._engine, requests)]
        except BonnxError:
            # The artifact or the machine failed, not a row: the next start does the rest.
            raise
        except Exception as failure:  # ONNX Runtime raises its own bare subclasses of Exception
            outcomes = [self._rank_alone(request) for request in requests]
            if len(requests) > 1 and not any(isinstance(outcome, Ranking) for outcome in outcomes):
                raise BonnxError(f"ONNX Runtime cannot go on: {failure}; nothing is lost: start again") from failure
            return outcomes

    def _rank_alone(self, request: RankRequest) -> Ranking | Exception:
        try:
            return rank_all(self._engine, [request])[0]
        except Exception as e:
            return BonnxError(f"ONNX Runtime cannot rank it: {e}")

    def _request(self, row: Row) -> RankRequest | str:
        if row.values is None:
            return row.reason or "it cannot be read"
        try:
            return self._checked(row.values)
        except BonnxError as e:
            return str(e)
        except Exception as e:  # a template or tokenizer may raise anything, and no row may end a run
            return f"it cannot be read: {type(e).__name__}: {e}"

    def _checked(self, values: dict[str, object]) -> RankRequest:
        """The request of a row.

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
        options = task.options.copy()
        if task.answers is not None:
            options["answers"] = cast(Answers, _listed(values[task.answers], task.answers))
        candidates = [
            _named(to_candidate, candidate, f"'{task.candidates}', element {i}")
            for i, candidate in enumerate(_listed(values[task.candidates], task.candidates))
        ]
        prompt = _named(to_item, values[task.prompt], f"'{task.prompt}'")
        names = ArgumentNames(task.prompt, task.candidates)
        return read_request(self._engine, prompt, candidates, **options, names=names)


def added(ranking: Ranking, best: object, names: Sequence[str]) -> dict[str, object]:
    """The new fields of a row, as JSON has them: null for NaN. `best` is the candidate of the row that won."""
    fields = {
        "best_index": ranking.best_index,
        "best": best,
        "candidate_scores": to_json(ranking.candidate_scores),
        "margin": to_json(ranking.margin),
        "scores": to_json(ranking.scores) if "scores" in names else None,
    }
    return {name: fields[name] for name in names}


def _listed(value: object, name: str) -> list[object]:
    if isinstance(value, list):
        return value
    got = f"{name_of(value)} that holds JSON: parse it first" if _holds_list(value) else name_of(value)
    raise InputError(f"'{name}': expected a list, with an element for each candidate; got {got}")


def _holds_list(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[")


def _named(read: Callable[[object], T], value: object, name: str) -> T:
    try:
        return read(value)
    except InputError as e:
        raise InputError(f"{name}: {e}") from e


def _joined(text: bytes, fields: dict[str, object]) -> bytes:
    """A row as it stands in its file, so that every digit of its fields stays, with new fields at its end."""
    return text[:-1].rstrip() + b", " + _line(fields)[1:]


def _line(value: dict[str, object]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        # Half of a surrogate pair, which JSON can hold and UTF-8 cannot.
        return json.dumps(value, allow_nan=False).encode() + b"\n"

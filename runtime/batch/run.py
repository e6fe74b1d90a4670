"""The loop: chunks are read, ranked and written in order, and an interrupted run resumes."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from bonnx.errors import InputError

from ..artifact.folder import read_manifest
from ..engine.providers import installed_flavours
from ..files.lines import opened
from ..rank.request import RankRequest
from .output import Output
from .source import Chunk, Part
from .worker import ChunkResult, Task, Worker

__all__ = ["Summary", "here", "identify", "run_batch"]

_BLOCK = 2**20
_QUIET_SECONDS = 10.0


@dataclass(frozen=True)
class Summary:
    """The result of a run.

    Attributes:
        rows: number of rows that were ranked, since the first start.
        bad: number of rows in the file of errors.
        seconds: duration since this start.
        resumed_at: number of chunks that were done before.
    """

    rows: int
    bad: int
    seconds: float
    resumed_at: int


def run_batch(
    task: Task,
    output: Path,
    work: Callable[[Task, Iterable[Chunk]], Iterator[ChunkResult]],
    *,
    rows: int = 256,
    strict: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Rank every row of a file.

    Args:
        task: what to do with each row.
        output: file to write; its kind is that of the input.
        work: ranks chunks and yields their results in order: `here`, or `on_ray`.
        rows: number of rows in a chunk.
        strict: stop at the first bad row.
        overwrite: start again.

    Raises:
        InputError: a file cannot be read or written, or with `strict` a row is bad.
        BonnxError: the output can no longer be written.
    """
    source = task.open()
    if output.suffix != Path(task.source).suffix:
        raise InputError(f"{output}: expected a name that ends with {Path(task.source).suffix}, as the input's does")
    for path in (output, output.with_name(output.name + ".errors.jsonl")):
        if os.path.exists(path) and path.samefile(task.source):  # a name that is too long raises in `Path.exists`
            raise InputError(f"{output}: {path.name} is the input; choose another file")
    start, state = time.monotonic(), _state(task)
    with Output(output, identify(task, rows), overwrite=overwrite) as out:
        done = out.journal.chunks
        if not out.journal.done:
            left = itertools.islice(source.chunks(rows), done, None)
            waiting, shares = itertools.tee(left)
            with _Watch(Path(task.source).name, out) as watch:
                for result in work(task, waiting):
                    chunk = next(shares)
                    if result.bad and strict:
                        # Not written: once the row is corrected, or without --strict, the run resumes here.
                        out.save()
                        raise InputError(f"{task.source}: {result.errors.partition(chr(10).encode())[0].decode()}")
                    out.add(result)
                    watch.tell(chunk.done)
        if _state(task) != state:
            raise InputError(f"{task.source}: it was changed while it was ranked; start again with --overwrite")
        out.finish()
        return Summary(out.journal.rows, out.journal.bad, time.monotonic() - start, done)


def here(task: Task, chunks: Iterable[Chunk]) -> Iterator[ChunkResult]:
    """Rank chunks in this process; the next one is read and tokenized while one is ranked."""
    worker = Worker(task)
    with ThreadPoolExecutor(1, "bonnx-read") as pool:
        ahead: Future[tuple[Chunk, Part, list[RankRequest | str]]] | None = None
        for chunk in chunks:
            following = pool.submit(worker.read, chunk)
            if ahead is not None:
                yield worker.rank(*ahead.result())
            ahead = following
        if ahead is not None:
            yield worker.rank(*ahead.result())


def identify(task: Task, rows: int) -> dict[str, object]:
    """Everything that the output depends on.

    Raises:
        ArtifactError: the artifact cannot be read.
        InputError: the input cannot be.
    """
    size, digest = 0, hashlib.sha256()
    with opened(task.source) as file:
        while block := file.read(_BLOCK):
            size += len(block)
            digest.update(block)
    settings = {name: value for name, value in asdict(task).items() if name not in ("artifact", "source")}
    return {
        **settings,
        "chunk": rows,
        "input_size": size,
        "input_sha256": digest.hexdigest(),
        "artifact": read_manifest(Path(task.artifact)).seal,
        "onnxruntime": [*installed_flavours().values()],
    }


def _state(task: Task) -> tuple[int, int, int]:
    """Values that change when the input is written during a run; between runs its hash shows it."""
    try:
        status = Path(task.source).stat()
    except OSError as e:
        raise InputError(f"{task.source}: cannot be read any more: {e.strerror or e}") from e
    return status.st_ino, status.st_size, status.st_mtime_ns


class _Watch:
    """Shows the progress of a run: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, name: str, out: Output) -> None:
        self._out, self._before = out, out.journal.rows + out.journal.bad
        self._start = self._told = time.monotonic()
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn(name), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(name, total=1.0, rate="")

    def __enter__(self) -> _Watch:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, share: float) -> None:
        """Show that this share of the input is done."""
        journal, now = self._out.journal, time.monotonic()
        rate = (journal.rows + journal.bad - self._before) / max(1e-9, now - self._start)
        progress = f"{journal.rows:,} rows, {journal.bad:,} bad, {rate:,.0f} rows/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=share, rate=progress)
        elif now - self._told > _QUIET_SECONDS:
            self._told = now
            left = (now - self._start) * (1 - share) / max(share, 1e-9)
            print(f"{100 * share:.1f}%: {progress}, about {left:.0f} s left", file=sys.stderr, flush=True)

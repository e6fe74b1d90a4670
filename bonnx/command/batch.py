"""`bonnx batch`: rank every row of a file; a run that is killed resumes when it is started again."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from bonnx.runtime.artifact.manifest import AGGREGATIONS, VOTES
from bonnx.runtime.batch import Summary, Task, here, run_batch
from bonnx.runtime.batch.source import Chunk
from bonnx.runtime.batch.worker import ChunkResult
from bonnx.runtime.rank.request import RankOptions
from bonnx.runtime.selection.aggregate import aggregation_code
from bonnx.runtime.selection.answers import extractor

from ..errors import BonnxError, InputError
from . import add_cache_dir, print_json
from .ray_cluster import add_ray_address, join_cluster, not_installed, warn_if_too_large

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("artifact", help="folder that `bonnx export` wrote")
    parser.add_argument("input", help="JSON lines (.jsonl, .ndjson) or Parquet (.parquet), one prompt a row")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write, of the same kind as the input")
    parser.add_argument("--overwrite", action="store_true", help="start again, and replace an existing output")
    parser.add_argument("--prompt-field", default="prompt", metavar="NAME", help="field with the prompt")
    parser.add_argument("--candidates-field", default="candidates", metavar="NAME", help="field with the candidates")
    parser.add_argument("--answers-field", metavar="NAME", help="field with what each candidate votes for")
    parser.add_argument("--answers", help="what candidates vote for: boxed, number or regex:PATTERN")
    parser.add_argument(
        "--vote", choices=VOTES, default="score", help="choose by score, or vote by the answers' weights or number"
    )
    parser.add_argument(
        "--aggregation",
        help=f"{', '.join(AGGREGATIONS)}, or step_ and one of these; by default the artifact's own rule",
    )
    parser.add_argument("--partial", action="store_true", help="candidates are unfinished: append no end token")
    parser.add_argument("--truncate", action="store_true", help="drop the beginning of a prompt that is too long")
    parser.add_argument(
        "--instruction", help="of a reranker: what makes a document relevant (default: the model's own)"
    )
    parser.add_argument("--token-scores", action="store_true", help="also write the score of every token")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad row")
    parser.add_argument(
        "--chunk", type=int, default=256, metavar="ROWS", help="rows that are ranked and written together"
    )
    parser.add_argument(
        "--max-line", type=int, default=16 * 2**20, metavar="BYTES", help="maximum length of a line of JSON"
    )
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda"], default="auto", help="where the model runs")
    parser.add_argument(
        "--threads", type=int, help="CPU threads of one run; by default one for each physical core, on Ray 1"
    )
    add_cache_dir(parser)
    parser.add_argument("--ray", action="store_true", help="run on Ray Data: workers rank, this process writes")
    add_ray_address(parser)
    parser.add_argument(
        "--ray-workers", type=int, default=1, metavar="N", help="number of workers, each with its own model"
    )
    parser.add_argument("--ray-gpus", type=float, default=0, help="GPUs of each worker")


def run(arguments: argparse.Namespace) -> int:
    """Rank, and print a summary."""
    _check(arguments)
    options = RankOptions(
        aggregation=arguments.aggregation,
        vote=arguments.vote,
        partial=arguments.partial,
        truncate=arguments.truncate,
        instruction=arguments.instruction,
    )
    if arguments.answers is not None:
        options["answers"] = arguments.answers
    task = Task(
        artifact=str(Path(arguments.artifact).resolve()),
        source=str(Path(arguments.input).absolute()),
        prompt=arguments.prompt_field,
        candidates=arguments.candidates_field,
        answers=arguments.answers_field,
        token_scores=arguments.token_scores,
        options=options,
        max_line=arguments.max_line,
        provider=arguments.provider,
        threads=1 if arguments.ray and arguments.threads is None else arguments.threads,
        cache_dir=arguments.cache_dir,
    )
    work = _ray(arguments, task) if arguments.ray else here
    signals: list[int] = []

    def stop(number: int, _: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        summary = run_batch(
            task, arguments.output, work, rows=arguments.chunk, strict=arguments.strict, overwrite=arguments.overwrite
        )
    except BonnxError:
        # A library that is stopped while it loads reports a failure of its own.
        if signals:
            raise KeyboardInterrupt from None
        raise
    if not summary.rows:
        raise BonnxError(_nothing(arguments.output, summary))
    if arguments.json:
        print_json({"output": str(arguments.output), **msgspec.to_builtins(summary)})
    else:
        errors = f", {summary.bad:,} bad in {arguments.output}.errors.jsonl" if summary.bad else ""
        rows = f"{summary.rows:,} row{'s' * (summary.rows != 1)}"
        print(f"{arguments.output}: {rows}{errors}, {summary.seconds:.1f} s")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that are invalid, or that would fail for every row."""
    for name in ("chunk", "max_line", "ray_workers"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1; got {getattr(arguments, name)}")
    if arguments.answers is not None and arguments.answers_field is not None:
        raise InputError("--answers and --answers-field: expected one of them; got both")
    if arguments.vote != "score" and arguments.answers is None and arguments.answers_field is None:
        raise InputError(f"--vote {arguments.vote}: needs --answers or --answers-field")
    if arguments.aggregation is not None:
        aggregation_code(arguments.aggregation)
    if arguments.answers is not None:
        extractor(arguments.answers)


def _nothing(output: Path, summary: Summary) -> str:
    """Why no row was ranked, which counts as a failure."""
    if not summary.bad:
        return f"no row was ranked: the input has none; {output} is empty"
    errors = output.with_name(output.name + ".errors.jsonl")
    with errors.open("rb") as file:
        first = file.readline().decode().strip()
    return f"no row was ranked, {summary.bad:,} are in {errors}, the first: {first:.500}"


def _ray(arguments: argparse.Namespace, task: Task) -> Callable[[Task, Iterable[Chunk]], Iterator[ChunkResult]]:
    try:
        from bonnx.runtime.batch.ray_data import on_ray
    except ModuleNotFoundError as e:
        raise not_installed(e) from e
    join_cluster(arguments.ray_address)
    warn_if_too_large("bonnx batch", arguments.ray_workers, task.threads or 1)
    return on_ray(arguments.ray_workers, task.threads or 1, arguments.ray_gpus)

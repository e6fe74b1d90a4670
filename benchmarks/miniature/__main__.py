"""`python -m benchmarks.miniature RUN` computes the missing results in RUN and draws; `--draw` only draws.

A run that was stopped for any reason resumes where it stopped: every finished task is a line of `results.jsonl`.
`python -m benchmarks.miniature RUN --models shipped --puzzles 20 --table` runs every method on 20 puzzles and prints
accuracy and cost.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bonnx.models.countdown import CHECKPOINT

from .figures import draw, table
from .work import compute, plan, puzzles

_CHECKPOINTS = {"shipped": CHECKPOINT, **{name: CHECKPOINT / name for name in ("small", "small_outcome", "revise")}}


def export(folder: Path, models: Collection[str]) -> Path:
    """Export the artifacts of these models that do not exist yet; return their folder."""
    for name in models:
        checkpoint = _CHECKPOINTS[name]
        if not (folder / name / "manifest.json").is_file():
            print(f"exporting {name}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "bonnx", "export", "--checkpoint", str(checkpoint)]
            subprocess.run([*command, "-o", str(folder / name)], check=True, stdout=subprocess.DEVNULL)
    return folder


def finished(path: Path) -> dict[str, Any]:
    """Return the results by task, from a run or its compressed form; an incomplete last line is removed."""
    packed = path.with_suffix(".jsonl.gz")
    if not path.is_file():
        lines = gzip.decompress(packed.read_bytes()).splitlines() if packed.is_file() else []
        return {line["task"]: line["result"] for line in map(json.loads, lines)}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return {line["task"]: line["result"] for line in map(json.loads, whole.splitlines())}


def run(folder: Path, count: int, workers: int, models: Collection[str]) -> None:
    """Compute all tasks of these models that have no result yet."""
    folder.mkdir(parents=True, exist_ok=True)
    path, drawn = folder / "results.jsonl", puzzles(count)
    done = finished(path)
    tasks = [task for task in plan(count) if task[0] in models and "/".join(map(str, task)) not in done]
    if not tasks:
        return
    artifacts = export(folder / "models", models)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    start = time.monotonic()
    with (
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress,
        path.open("a", encoding="utf-8") as file,
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
    ):
        bar = progress.add_task("tasks", total=len(done) + len(tasks), completed=len(done))
        futures = {pool.submit(compute, artifacts, task, drawn[task[2]]): task for task in tasks}
        for future in as_completed(futures):
            line = {"task": "/".join(map(str, futures[future])), "result": future.result()}
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            file.flush()
            progress.advance(bar)
    print(f"{len(tasks)} tasks in {time.monotonic() - start:.0f} s", file=sys.stderr)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN")
    parser.add_argument("--puzzles", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2, help="processes with one thread each (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=_CHECKPOINTS, default=[*_CHECKPOINTS])
    parser.add_argument("--draw", action="store_true", help="only draw the stored results")
    parser.add_argument(
        "--table", action="store_true", help="print accuracy and cost of every method instead of drawing"
    )
    arguments = parser.parse_args()
    if not arguments.draw:
        run(arguments.folder, arguments.puzzles, arguments.workers, arguments.models)
    results = finished(arguments.folder / "results.jsonl")
    if arguments.table:
        print(table(results, arguments.puzzles))
    else:
        draw(results, arguments.folder)


if __name__ == "__main__":
    main()

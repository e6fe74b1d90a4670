"""Kill `bonnx batch` at random moments and restart it until it finishes: is the output that of an uninterrupted run?

`python -m benchmarks.kill artifacts/countdown` does 20 rounds. With `--ray`, it runs on Ray Data: each round kills the
driver in one run, and in another a worker, after which the run must finish by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import add_output, record
from bonnx.models.countdown.puzzle import draw_solution

__all__ = ["kill_a_worker", "kill_again_and_again", "leftovers", "run", "start"]


# The output of the run that was started last.
_LOG = Path(tempfile.gettempdir()) / f"bonnx-batch-{os.getpid()}.log"


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start `bonnx batch` with these arguments."""
    command = [sys.executable, "-m", "bonnx", "batch", *arguments]
    with _LOG.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def check_ended(process: subprocess.Popen[bytes], moment: str) -> None:
    """Wait for a run; if it fails, exit with its output."""
    if process.wait():
        raise SystemExit(f"{moment}, the run failed with status {process.returncode}: {_LOG.read_text()[-2000:]}")


def run(arguments: Sequence[str]) -> float:
    """Run `bonnx batch` without interruption; return the seconds it took."""
    begin = time.monotonic()
    check_ended(start(arguments), "uninterrupted")
    return time.monotonic() - begin


def kill_again_and_again(
    arguments: Sequence[str], output: Path, seconds: float, rng: random.Random, most: int = 1000
) -> int:
    """Kill a run with SIGKILL at random moments and restart it until it finishes; return the number of kills.

    Only kills before the run was complete count. After `most` of them, the run may finish without interruption.
    """
    killed = 0
    while True:
        process = start(arguments)
        if killed == most:
            check_ended(process, f"after {killed} kills")
            return killed
        try:
            process.wait(rng.uniform(0.2 * seconds, 1.1 * seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            if not output.with_name(output.name + ".progress").is_file() and output.is_file():
                # The output was complete; only the exit was missing.
                return killed
            killed += output.with_name(output.name + ".progress").is_file()
            # Less work remains after each start, so the run finishes eventually.
            continue
        check_ended(process, f"after {killed} kills")
        return killed


def kill_a_worker(arguments: Sequence[str], output: Path, name: str = "^ray::MapWorker") -> int:
    """Kill a worker with SIGKILL during a run, which must finish by itself; return the number of workers killed."""
    process, killed = start(arguments), 0
    progress = output.with_name(output.name + ".progress")
    while process.poll() is None and not killed:
        time.sleep(0.05)
        if progress.is_file() and json.loads(progress.read_bytes())["chunks"] > 0:
            workers = subprocess.run(["pgrep", "-f", name], capture_output=True, text=True, check=False).stdout.split()
            for number in workers[:1]:
                killed += not subprocess.run(["kill", "-9", number], check=False).returncode
    check_ended(process, "after a worker was killed")
    return killed


def leftovers(output: Path) -> dict[str, bytes]:
    """Return the contents of all files of a run, by file name suffix."""
    return {path.name.removeprefix(output.stem): path.read_bytes() for path in output.parent.glob(f"{output.stem}.*")}


def draw_rows(path: Path, count: int) -> None:
    """Write puzzles with four candidates each; some lines are malformed."""
    rng = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            puzzle, solution = draw_solution(rng, 4)
            row = {
                "id": i,
                "prompt": puzzle.prompt,
                "candidates": [solution, *(draw_solution(rng, 4)[1] for _ in "abc")],
            }
            file.write("{\n" if i % 50 == 7 else json.dumps(row) + "\n")


def main() -> None:
    """Run the rounds and print how many passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--ray", action="store_true")
    add_output(parser)
    options = parser.parse_args()
    rng, passed, kills, workers, seen = random.Random(), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as place:
        rows, uninterrupted = Path(place) / "rows.jsonl", Path(place) / "uninterrupted.jsonl"
        draw_rows(rows, options.rows)
        more = ["--chunk", "32", "--threads", "1", *(["--ray", "--ray-workers", "2"] if options.ray else [])]
        run([options.artifact, str(rows), "-o", str(uninterrupted), "--chunk", "32", "--threads", "1"])
        expected = leftovers(uninterrupted)
        first = Path(place) / "first.jsonl"
        seconds = run([options.artifact, str(rows), "-o", str(first), *more])
        # On Ray, most of a short run is startup.
        most = 3 if options.ray else 1000
        for number in range(options.rounds):
            output = Path(place) / f"killed{number}.jsonl"
            kills += kill_again_and_again(
                [options.artifact, str(rows), "-o", str(output), *more], output, seconds, rng, most
            )
            passed += leftovers(output) == expected
            print(f"{passed} of {number + 1} identical after {kills} kills", flush=True)
            if options.ray:
                output = Path(place) / f"worker{number}.jsonl"
                seen += kill_a_worker([options.artifact, str(rows), "-o", str(output), *more], output)
                workers += leftovers(output) == expected
                print(f"{workers} of {number + 1} identical after {seen} killed workers", flush=True)
    figure = {"rounds": options.rounds, "rows": options.rows, "ray": options.ray, "same": passed, "kills": kills}
    record("kill", [figure | {"same_without_worker": workers, "killed_workers": seen}], path=options.output)
    raise SystemExit(0 if passed == options.rounds and (not options.ray or workers == options.rounds) else 1)


if __name__ == "__main__":
    main()

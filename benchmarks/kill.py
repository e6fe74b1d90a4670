"""`bonnx batch` killed at random moments and started again, until it ends: are its bytes those of an undisturbed run?

`python -m benchmarks.kill artifacts/countdown` does 20 rounds. With `--ray`, on Ray Data, the driver is killed, and in
another run of each round a worker, after which the run must end by itself.
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

from bonnx.models.countdown.puzzle import draw_solution

__all__ = ["kill_a_worker", "kill_again_and_again", "leftovers", "run", "start"]


# What the run said that was started last.
_LOG = Path(tempfile.gettempdir()) / f"bonnx-batch-{os.getpid()}.log"


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """`bonnx batch` with these arguments."""
    command = [sys.executable, "-m", "bonnx", "batch", *arguments]
    with _LOG.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def check_ended(process: subprocess.Popen[bytes], moment: str) -> None:
    """Stop here, with what it said, if a run failed."""
    if process.wait():
        raise SystemExit(f"{moment} the run failed with {process.returncode}: {_LOG.read_text()[-2000:]}")


def run(arguments: Sequence[str]) -> float:
    """Run it undisturbed; how many seconds that took."""
    begin = time.monotonic()
    check_ended(start(arguments), "undisturbed")
    return time.monotonic() - begin


def kill_again_and_again(
    arguments: Sequence[str], output: Path, seconds: float, rng: random.Random, most: int = 1000
) -> int:
    """kill -9 at random moments of a run that takes so long, until it ends; how many kills came in its midst.

    After `most` of them it may end undisturbed.
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
                # It had done everything but to say so.
                return killed
            killed += output.with_name(output.name + ".progress").is_file()
            # What is left grows less with each start, so that it ends in time.
            continue
        check_ended(process, f"after {killed} kills")
        return killed


def kill_a_worker(arguments: Sequence[str], output: Path, name: str = "^ray::MapWorker") -> int:
    """kill -9 an actor in the midst of a run, which must end by itself; how many were killed."""
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
    """Everything that a run left, by the ending of its name."""
    return {path.name.removeprefix(output.stem): path.read_bytes() for path in output.parent.glob(f"{output.stem}.*")}


def draw_rows(path: Path, count: int) -> None:
    """Puzzles with four candidates each; some lines are none."""
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
    """Print how many rounds passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()
    rng, passed, kills, workers, seen = random.Random(), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as place:
        rows, peace = Path(place) / "rows.jsonl", Path(place) / "peace.jsonl"
        draw_rows(rows, options.rows)
        more = ["--chunk", "32", "--threads", "1", *(["--ray", "--ray-workers", "2"] if options.ray else [])]
        run([options.artifact, str(rows), "-o", str(peace), "--chunk", "32", "--threads", "1"])
        expected = leftovers(peace)
        first = Path(place) / "first.jsonl"
        seconds = run([options.artifact, str(rows), "-o", str(first), *more])
        # On Ray most of a short run is its start.
        most = 3 if options.ray else 1000
        for number in range(options.rounds):
            output = Path(place) / f"killed{number}.jsonl"
            kills += kill_again_and_again(
                [options.artifact, str(rows), "-o", str(output), *more], output, seconds, rng, most
            )
            passed += leftovers(output) == expected
            print(f"{passed} of {number + 1} the same, {kills} kills in their midst", flush=True)
            if options.ray:
                output = Path(place) / f"worker{number}.jsonl"
                seen += kill_a_worker([options.artifact, str(rows), "-o", str(output), *more], output)
                workers += leftovers(output) == expected
                print(f"{workers} of {number + 1} the same after {seen} killed workers", flush=True)
    raise SystemExit(0 if passed == options.rounds and (not options.ray or workers == options.rounds) else 1)


if __name__ == "__main__":
    main()

"""A page of `bonnx page` in headless Chromium: time until it can be used, and tokens a second beside Python.

    python -m benchmarks.page ARTIFACT ... --threads 1 2

For each artifact and number of threads the page is written, served from this machine, and visited twice by each of
several fresh browsers: the second visit finds the model in the browser's cache. Then the first example of the page is
answered again and again, with as many candidates as the page proposes (16 for Countdown): the first time, and the
median of the second half, when the browser has compiled everything with its optimizing compiler. Python does the same
with as many threads, token by token (`stream`) and in one run (`generate`). All figures are medians; the times are
followed by the least and the largest. Needs Node, Chromium, and npm's puppeteer-core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bonnx
from bonnx.runtime.page import write_page
from bonnx.runtime.page.serve import make_server

SCRIPT = Path(__file__).with_suffix(".mjs")
PUPPETEER = "puppeteer-core@24.43.1"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server for a folder."""
    with make_server(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://localhost:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def find_chromium() -> str | None:
    """The browser's program, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def visit(page: Path, folder: Path, repeats: int, runs: int) -> list[dict[str, Any]]:
    """What the browsers measured."""
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("Chromium was not found")
    shutil.copy(SCRIPT, folder)
    with serving(page) as url:
        command = ["node", SCRIPT.name, chromium, url, str(repeats), str(runs)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def rate(generate: Callable[[int], int], runs: int) -> float:
    """Tokens a second, the median over seeds."""
    rates = []
    for seed in range(runs + 1):
        start = time.perf_counter()
        tokens = generate(seed)
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def python_rates(artifact: Path, settings: dict[str, Any], threads: int, runs: int) -> str:
    """Tokens a second of Python, for what the page asks."""
    model = bonnx.load(artifact, provider="cpu", threads=threads)
    prompt = settings["examples"][0]
    if settings["chat"]:
        prompt = [{"role": "user", "content": prompt}]
    options = {"n": settings["candidates"], "temperature": settings["temperature"]}
    if settings["kind"] != "countdown":
        options["max_new_tokens"] = settings["longest"]
    ways = {"generate": lambda seed: model.generate(prompt, seed=seed, **options).computed_tokens}
    if "decode" in settings["graphs"]:
        ways["stream"] = lambda seed: [*model.stream(prompt, seed=seed, **options)][-1].computed_tokens
    return ", ".join(f"{rate(way, runs):.0f} ({name})" for name, way in ways.items())


def row(artifact: Path, threads: int, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The cells of one artifact with a number of threads."""
    page = folder / f"{artifact.name}-{threads}"
    written = write_page(artifact, page, packages=arguments.packages)
    settings = json.loads((page / "page.json").read_text(encoding="utf-8"))
    (page / "page.json").write_text(json.dumps(settings | {"threads": threads}), encoding="utf-8")
    found = visit(page, folder, arguments.repeats, arguments.runs)

    def times(visit: str, what: str) -> str:
        values = [each[visit][what] / 1000 for each in found]
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    def tokens(runs: slice) -> str:
        return f"{statistics.median(count / seconds for each in found for count, seconds in each['runs'][runs]):.0f}"

    return [
        artifact.name,
        f"{written.model_bytes / 1e6:.1f}",
        str(threads),
        times("first", "paint"),
        times("first", "ready"),
        times("second", "ready"),
        tokens(slice(1)),
        tokens(slice(arguments.runs // 2, None)),
        python_rates(artifact, settings, threads, arguments.runs),
    ]


HEADER = [
    *("artifact", "MB", "threads", "first paint, s", "ready, s", "ready again, s"),
    *("tokens/s, first time", "tokens/s, later", "tokens/s, Python"),
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path, metavar="ARTIFACT")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="folder node_modules to copy from")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--repeats", type=int, default=5, help="browsers (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=20, help="generations in each (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "package.json").write_text("{}")
        subprocess.run(["npm", "install", "--silent", "--ignore-scripts", PUPPETEER], cwd=folder, check=True)
        for artifact in arguments.artifacts:
            for threads in arguments.threads:
                print(f"| {' | '.join(row(artifact, threads, folder, arguments))} |", flush=True)


if __name__ == "__main__":
    main()

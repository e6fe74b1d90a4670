"""A page of `bonnx page` in headless Chromium: time until it can be used, and tokens a second beside Python.

    python -m benchmarks.page ARTIFACT ... --threads 1 2

For each artifact the page is written, served from this machine, and visited twice by each of several fresh browsers:
the second visit finds the model in the browser's cache. It runs with as many threads as it chooses itself. Then the
first example of the page is answered again and again, with as many candidates as the page proposes (16 for Countdown):
the first time, and the median of the second half, when the browser has compiled everything with its optimizing
compiler. Python does the same token by token (`stream`). All figures are medians; the times are followed by the least
and the largest.

A second table says what of the difference is WebAssembly's: for each number of threads, the same browser and Python
run the graph `generate` and nothing else, and products of matrices of the model's sizes, as many rows as candidates,
with the precision of its weights.
Needs Node, Chromium, and npm's puppeteer-core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import bonnx
from bonnx.runtime.artifact.folder import read_manifest
from bonnx.runtime.page import write_page
from bonnx.runtime.page.serve import make_server

FLOAT, INT8, INT32, UINT8 = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT8,
    onnx.TensorProto.INT32,
    onnx.TensorProto.UINT8,
)
SCRIPT = Path(__file__).with_suffix(".mjs")
PUPPETEER = "puppeteer-core@24.43.1"


@contextlib.contextmanager
def running(server: HTTPServer) -> Iterator[str]:
    """The address of a server, which runs in a thread of its own."""
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://localhost:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def serving(folder: Path) -> AbstractContextManager[str]:
    """The address of a server for a folder."""
    return running(make_server(folder, 0))


def find_chromium() -> str | None:
    """The browser's program, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def visit(page: Path, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What the browsers measured."""
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("Chromium was not found")
    shutil.copy(SCRIPT, folder)
    with serving(page) as url:
        numbers = map(str, [arguments.repeats, arguments.runs, *arguments.threads])
        command = ["node", SCRIPT.name, chromium, url, *numbers]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def write_products(artifact: Path, rows: int, path: Path) -> int:
    """Write a graph that multiplies `rows` rows with matrices of the sizes of the artifact's weights.

    Those of int8 are multiplied with uint8, as in the artifact.

    Returns:
        The operations of a run: two for each number of each row and matrix.
    """
    decode = onnx.load(artifact / read_manifest(artifact).graphs["decode"].file, load_external_data=False).graph
    kind = INT8 if any(weight.data_type == INT8 for weight in decode.initializer) else FLOAT
    sizes = [w.dims for w in decode.initializer if w.data_type == kind and len(w.dims) == 2 and min(w.dims) > 1]
    numbers = np.random.default_rng(0)
    weights, nodes = [], []
    for i, size in enumerate(sizes):
        weight = numbers.integers(-127, 128, size).astype(np.int8 if kind == INT8 else np.float32)
        weights.append(onnx.numpy_helper.from_array(weight, f"weight{i}"))
        nodes += [
            onnx.helper.make_node(
                "MatMul" if kind == FLOAT else "MatMulInteger", [f"rows{size[0]}", f"weight{i}"], [f"y{i}"]
            ),
            onnx.helper.make_node("ReduceMax", [f"y{i}"], [f"most{i}"], keepdims=1),
        ]
    nodes.append(onnx.helper.make_node("Concat", [f"most{i}" for i in range(len(sizes))], ["most"], axis=0))
    asked = [
        onnx.helper.make_tensor_value_info(f"rows{width}", UINT8 if kind == INT8 else FLOAT, [rows, width])
        for width in sorted({size[0] for size in sizes})
    ]
    given = onnx.helper.make_tensor_value_info("most", INT32 if kind == INT8 else FLOAT, [len(sizes), 1])
    graph = onnx.helper.make_graph(nodes, "products", asked, [given], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    return sum(2 * rows * math.prod(size) for size in sizes)


def native_seconds(path: Path, threads: int, runs: int) -> float:
    """How long the products take Python's ONNX Runtime, the median."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    dtypes = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
    feeds = {asked.name: np.ones(asked.shape, dtypes[asked.type]) for asked in session.get_inputs()}
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rate(generate: Callable[[int], int], runs: int) -> float:
    """Tokens a second, the median over seeds."""
    rates = []
    for seed in range(runs + 1):
        start = time.perf_counter()
        tokens = generate(seed)
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def python_rates(artifact: Path, settings: dict[str, Any], threads: int, runs: int) -> dict[str, str]:
    """Tokens a second of Python by method, for what the page asks."""
    model = bonnx.load(artifact, provider="cpu", threads=threads)
    prompt = settings["examples"][0]
    if settings["chat"]:
        prompt = [{"role": "user", "content": prompt}]
    options = {"n": settings["candidates"], "temperature": settings["temperature"]}
    if settings["kind"] != "countdown":
        options["max_new_tokens"] = settings["longest"]
    ways = {
        "generate": lambda seed: model.generate(prompt, seed=seed, **options).computed_tokens,
        "stream": lambda seed: [*model.stream(prompt, seed=seed, **options)][-1].computed_tokens,
    }
    return {name: f"{rate(way, runs):.0f}" for name, way in ways.items()}


Cells = list[str]


def rows(artifact: Path, folder: Path, arguments: argparse.Namespace) -> tuple[Cells, list[Cells]]:
    """The row of an artifact in the first table, and those in the second."""
    page = folder / artifact.name
    written = write_page(artifact, page, packages=arguments.packages)
    settings = json.loads((page / "page.json").read_text(encoding="utf-8"))
    # A page that grows candidates has no use for this graph.
    generate = read_manifest(artifact).graphs["generate"].file
    shutil.copy(artifact / generate, page / "model" / generate)
    products = page / "products.onnx"
    operations = write_products(artifact, settings["candidates"], products)
    found = visit(page, folder, arguments)
    later = slice(arguments.runs // 2, None)
    python = {number: python_rates(artifact, settings, number, arguments.runs) for number in arguments.threads}

    def times(visit: str, what: str) -> str:
        values = [each[visit][what] / 1000 for each in found]
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    def tokens(runs: list[tuple[int, float]]) -> str:
        return f"{statistics.median(count / seconds for count, seconds in runs):.0f}"

    def speed(seconds: float) -> str:
        return f"{operations / seconds / 1e9:.0f}"

    of_page = [
        artifact.name,
        f"{written.model_bytes / 1e6:.1f}",
        times("first", "paint"),
        times("first", "ready"),
        times("second", "ready"),
        tokens([each["runs"][0] for each in found]),
        tokens([run for each in found for run in each["runs"][later]]),
        *(python[number]["stream"] for number in arguments.threads),
    ]
    of_bare = []
    for number in arguments.threads:
        bare = [each["bare"][str(number)] for each in found]
        of_bare.append(
            [
                artifact.name,
                str(number),
                tokens([run for each in bare for run in each["runs"][later]]),
                python[number]["generate"],
                speed(statistics.median(time for each in bare for time in each["products"][later])),
                speed(native_seconds(products, number, arguments.runs)),
            ]
        )
    return of_page, of_bare


PAGE_HEADER = [
    *("artifact", "MB", "first paint, s", "ready, s", "ready again, s"),
    *("tokens/s, first time", "tokens/s, later"),
]
BARE_HEADER = [
    *("artifact", "threads", "generate in WebAssembly, tokens/s", "in Python, tokens/s"),
    *("products in WebAssembly, 10^9 operations/s", "in Python, 10^9 operations/s"),
]


def table(header: Cells, lines: Sequence[Cells]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path, metavar="ARTIFACT")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="folder node_modules to copy from")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--repeats", type=int, default=5, help="browsers (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=20, help="generations in each (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "package.json").write_text("{}")
        subprocess.run(["npm", "install", "--silent", "--ignore-scripts", PUPPETEER], cwd=folder, check=True)
        made = [rows(artifact, folder, arguments) for artifact in arguments.artifacts]
    header = PAGE_HEADER + [f"Python's stream, {number} threads" for number in arguments.threads]
    print(table(header, [of_page for of_page, _ in made]), end="\n\n")
    print(table(BARE_HEADER, [cells for _, of_bare in made for cells in of_bare]))


if __name__ == "__main__":
    main()

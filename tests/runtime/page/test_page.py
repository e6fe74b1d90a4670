"""The page: what is written, and in Chromium what a visitor sees."""

import functools
import http.server
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import bonnx
from benchmarks.page import find_chromium, running, serving
from bonnx.errors import ArtifactError, InputError
from bonnx.export.artifact import _write_manifest
from bonnx.models.countdown.puzzle import check, draw_solution, parse_prompt
from bonnx.runtime.artifact.folder import MANIFEST, read_manifest
from bonnx.runtime.page import write as module
from bonnx.runtime.page import write_page
from tests.command_line import run
from tests.folded import folded
from tests.npm import install
from tests.pages import ROOT

SCRIPT = Path(__file__).with_name("browse.mjs")
CURVE = ROOT / "models/countdown/report.json"
TOOLS = ["puppeteer-core@24.43.1", "axe-core@4.14.1"]


@pytest.fixture(scope="module")
def npm_folder(tmp_path_factory):
    """The packages that the page copies, and those that drive a browser."""
    folder = tmp_path_factory.mktemp("npm")
    package = json.loads((ROOT / "js/package.json").read_text(encoding="utf-8"))
    needed = [f"{name}@{version}" for name, version in package["dependencies"].items()]
    install(folder, [module.RUNTIME, *needed, *TOOLS])
    yield folder
    shutil.rmtree(folder / "node_modules")


@pytest.fixture(scope="module")
def site(countdown, npm_folder, tmp_path_factory):
    """A page of the model that ships."""
    folder = tmp_path_factory.mktemp("site") / "page"
    write_page(countdown, folder, curve=CURVE, packages=npm_folder / "node_modules")
    return folder


def hosting(folder, handler):
    """The address of a host that answers as a handler does."""
    return running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder)))


class Plain(http.server.SimpleHTTPRequestHandler):
    """A host that sends no headers of its own, as many do."""

    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}
    # Where connections stay open, a browser finds out that a file was cut.
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        """Say nothing."""


class WithoutWorkers(Plain):
    """One from which no service worker can be installed."""

    def do_GET(self):
        if "Service-Worker" in self.headers:
            self.send_error(403)
        else:
            super().do_GET()


WEIGHTS = "/model/onnx/weights.bin"


class Faulty(Plain):
    """One whose first answer about the weights is not the file: a subclass says what it is instead."""

    def end_headers(self):
        # Without these the page would load twice.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def do_GET(self):
        weights = urlsplit(self.path).path == WEIGHTS
        if not weights or WEIGHTS in self.asked:
            super().do_GET()
        else:
            data = Path(self.directory, WEIGHTS[1:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(self.spoil(data))
            self.close_connection = True
        self.asked.append(urlsplit(self.path).path)


def make_faulty(spoil):
    """A host whose first answer about the weights is what `spoil` makes of them, and what it was asked for."""
    asked = []
    return type("Faulty", (Faulty,), {"asked": asked, "spoil": staticmethod(spoil)}), asked


def browse(npm_folder, url, steps, *switches):
    """What each step saw; nothing may be fetched from elsewhere."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("Chromium is not installed")
    script, asked, found = (npm_folder / name for name in (SCRIPT.name, "steps.json", "results.json"))
    shutil.copy(SCRIPT, script)
    asked.write_text(json.dumps(steps))
    command = [shutil.which("node"), script, chromium, url, asked, found, *switches]
    done = subprocess.run(command, cwd=npm_folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(found.read_text())
    assert results["outside"] == []
    assert results["errors"] == []
    return results["steps"]


def test_a_visitor_sees_the_candidates_and_the_winner(countdown, site, npm_folder):
    model = bonnx.load(countdown)
    phone = {"width": 390, "height": 780, "dark": True, "axe": True}
    fills = [{}, {"n": 5, "seed": 3, "method": "pruned"}, {"n": 8, "seed": 4, "method": "majority"}]
    steps = [
        {"fill": fills[0], "axe": True},
        phone | {"fill": fills[1], "key": "Enter"},
        {"fill": fills[2], "key": "Enter"},
        {"fill": {"prompt": "3,7,20"}},
    ]
    with serving(site) as url:
        first, second, third, bad = browse(npm_folder, url, steps)
    for step in (first, second):
        assert step["violations"] == []
        assert not step["before"]["wide"]
        assert not step["after"]["wide"]
        assert step["before"]["isolated"]
    puzzle = parse_prompt("3,7,20,24>1:")
    expected = [
        model.generate(puzzle.prompt, n=16, seed=0),
        model.generate(puzzle.prompt, n=5, seed=3, prune_every=8),
        model.generate(puzzle.prompt, n=8, seed=4, vote="majority", answers=lambda text: text or None),
    ]
    for step, generation in zip((first, second, third), expected, strict=True):
        cards = step["after"]["cards"]
        assert sorted(card["text"] for card in cards) == sorted(c.text for c in generation.candidates)
        assert [card["winner"] for card in cards] == [True, *[False] * (len(cards) - 1)]
        assert cards[0]["text"] == generation.best.text
        assert cards[0]["score"] == f"{generation.best.score:.3f}"
        assert f"Chosen: candidate {generation.best_index + 1} of {len(cards)}." in step["after"]["status"]
        pruned = [c.finish_reason == "pruned" for c in generation.candidates]
        assert sum(card["dropped"] for card in cards) == sum(pruned)
        for card in cards:
            assert len(card["colours"]) > 0
            if not card["dropped"]:
                assert (card["note"] == "right") == check(puzzle, card["text"])
    assert "Expected a puzzle such as 3,7,20,24>1: but got 3,7,20" in bad["after"]["problem"]


def test_scores_that_are_no_probabilities(site, npm_folder, tmp_path):
    """Of a model without a scorer they are certainties; the colours go from the least to the largest."""
    page = shutil.copytree(site, tmp_path / "page")
    settings = json.loads((page / "page.json").read_text())
    settings |= {"kind": "text", "scorer": False, "probability": False, "longest": 12}
    (page / "page.json").write_text(json.dumps(settings))
    with serving(page) as url:
        (step,) = browse(npm_folder, url, [{"axe": True}])
    assert "The one of which it is most certain is chosen." in step["after"]["about"]
    colours = [colour for card in step["after"]["cards"] for colour in card["colours"]]
    assert len(set(colours)) > 10
    assert step["violations"] == []


def test_a_page_of_a_single_file(countdown, npm_folder, tmp_path):
    artifact = folded(countdown, tmp_path / "one", "generate")
    write_page(artifact, tmp_path / "page", packages=npm_folder / "node_modules")
    assert [path.name for path in (tmp_path / "page/model/onnx").iterdir()] == ["generate.onnx"]
    with serving(tmp_path / "page") as url:
        (step,) = browse(npm_folder, url, [{"axe": True}])
    generation = bonnx.load(artifact).generate("3,7,20,24>1:", n=16, seed=0)
    cards = step["after"]["cards"]
    assert sorted(card["text"] for card in cards) == sorted(c.text for c in generation.candidates)
    assert cards[0]["text"] == generation.best.text
    assert cards[0]["score"] == f"{generation.best.score:.3f}"
    assert f"Chosen: candidate {generation.best_index + 1} of 16." in step["after"]["status"]
    assert step["violations"] == []


@pytest.fixture
def webgpu_page(countdown, npm_folder, tmp_path):
    """A page that tries WebGPU, with one candidate: in software it takes seconds for each token."""
    write_page(countdown, tmp_path / "page", packages=npm_folder / "node_modules", webgpu=True)
    settings = json.loads((tmp_path / "page/page.json").read_text())
    (tmp_path / "page/page.json").write_text(json.dumps(settings | {"candidates": 1}))
    return tmp_path / "page"


def check_facts(countdown, step, facts):
    assert re.search(facts, step["before"]["facts"]), step["before"]["facts"]
    assert step["after"]["cards"][0]["text"] == bonnx.load(countdown).generate("3,7,20,24>1:", n=1, seed=0).best.text


def test_a_browser_without_webgpu_runs_in_webassembly(countdown, webgpu_page, npm_folder):
    with serving(webgpu_page) as url:
        (step,) = browse(npm_folder, url, [{}], "--disable-features=WebGPU", "--disable-gpu")
    check_facts(countdown, step, r"runs in WebAssembly\. WebGPU is not used: this browser offers none\.$")


@pytest.mark.slow
def test_webgpu_is_used_where_it_chooses_the_same_winner(countdown, webgpu_page, npm_folder):
    """SwiftShader computes in software what a graphics processor would, and takes longer than WebAssembly."""
    software = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    with serving(webgpu_page) as url:
        slower, used = browse(npm_folder, url, [{}, {"path": "?webgpu=always"}], *software)
    if "this browser offers none" in slower["before"]["facts"]:
        pytest.skip("this Chromium has no WebGPU, not even in software")
    check_facts(
        countdown, slower, r"runs in WebAssembly\. WebGPU is not used: it took \d+ ms where WebAssembly took \d+\.$"
    )
    check_facts(countdown, used, r"runs in WebGPU\.$")


def test_a_browser_draws_the_same_tokens_as_python(countdown, site, npm_folder, rng):
    model, drawn = bonnx.load(countdown), random.Random(int(rng.integers(2**32)))
    asked = [[draw_solution(drawn, 4)[0].prompt, {"n": 4, "seed": drawn.randrange(2**32)}] for _ in range(100)]
    with serving(site) as url:
        (step,) = browse(npm_folder, url, [{"module": asked}])
    same = 0
    for (prompt, options), found in zip(asked, step["found"], strict=True):
        generation = model.generate(prompt, **options)
        tokens = [candidate.tokens.tolist() for candidate in generation.candidates]
        same += found["tokens"] == tokens
        if found["tokens"] == tokens:
            scores = [candidate.score for candidate in generation.candidates]
            assert found["scores"] == pytest.approx(scores, abs=1e-4)
            # Equal candidates have equal scores but for rounding.
            assert scores[found["bestIndex"]] == pytest.approx(max(scores), abs=1e-4)
    # Where two tokens are as likely, but for rounding, runtimes may differ.
    assert same >= 98


def test_a_host_without_the_headers(countdown, site, npm_folder):
    """A service worker adds them, and the page loads again; without one, the model runs on a single thread."""
    best = bonnx.load(countdown).generate("3,7,20,24>1:", n=16, seed=0).best.text
    for handler, isolated in ((Plain, True), (WithoutWorkers, False)):
        with hosting(site, handler) as url:
            (step,) = browse(npm_folder, url, [{"isolated": isolated}])
        assert step["after"]["isolated"] == isolated
        assert step["after"]["cards"][0]["text"] == best


def test_the_second_visit_loads_no_file_of_the_model(site, npm_folder):
    handler, asked = make_faulty(lambda data: data)
    with hosting(site, handler) as url:
        browse(npm_folder, url, [{}, {}])
    files = {f"/{path.relative_to(site)}" for path in (site / "model").rglob("*") if path.is_file()}
    assert {path: asked.count(path) for path in asked if path.startswith("/model/")} == dict.fromkeys(files, 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], "the transfer broke off after .* bytes"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "its sha256 is not the one"),
    ],
    ids=["truncated", "a changed byte"],
)
def test_a_bad_download_is_not_kept(countdown, site, npm_folder, spoil, message):
    best = bonnx.load(countdown).generate("3,7,20,24>1:", n=16, seed=0).best.text
    handler, _ = make_faulty(spoil)
    with hosting(site, handler) as url:
        bad, good = browse(npm_folder, url, [{}, {}])
    assert re.search(f"Reload the page.*{message}", bad["before"]["problem"]), bad["before"]
    assert good["after"]["cards"][0]["text"] == best


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ("--no-enable-sse4-1", "cannot run the model.*WebAssembly with SIMD.*use a newer one"),
        ("--jitless", "cannot run the model.*WebAssembly with SIMD.*use a newer one"),
        ("--wasm-max-mem-pages=600", "too little memory for the model"),
    ],
    ids=["without SIMD", "without WebAssembly", "with 38 MB of memory"],
)
def test_a_browser_that_cannot_run_the_model(switch, message, site, npm_folder):
    with serving(site) as url:
        (step,) = browse(npm_folder, url, [{}], f"--js-flags={switch}")
    assert re.search(message, step["before"]["problem"]), step["before"]
    assert step["before"]["cards"] == []
    assert not step["before"]["usable"]


def test_too_little_memory_for_so_many_candidates(site, npm_folder, tmp_path):
    """The model fits, and runs again with fewer."""
    page = shutil.copytree(site, tmp_path / "page")
    index = (page / "index.html").read_text(encoding="utf-8").replace('max="32"', 'max="256"')
    (page / "index.html").write_text(index, encoding="utf-8")
    with serving(page) as url:
        (step,) = browse(
            npm_folder, url, [{"fill": {"n": 256}, "then": {"n": 1}}], "--js-flags=--wasm-max-mem-pages=780"
        )
    assert "too little memory for the model. Close other pages, or ask for fewer candidates" in step["after"]["problem"]
    assert step["then"]["problem"] is None
    assert "Chosen: candidate 1 of 1" in step["then"]["status"]


def test_a_tokenizer_that_the_module_cannot_read(countdown, npm_folder, tmp_path):
    artifact = shutil.copytree(countdown, tmp_path / "artifact")
    manifest = read_manifest(artifact)
    described = json.loads((artifact / manifest.tokenizer).read_text(encoding="utf-8"))
    described["pre_tokenizer"] = {"type": "BertPreTokenizer"}
    (artifact / manifest.tokenizer).write_text(json.dumps(described), encoding="utf-8")
    (artifact / MANIFEST).unlink()
    _write_manifest(manifest, artifact)
    write_page(artifact, tmp_path / "page", packages=npm_folder / "node_modules")
    with serving(tmp_path / "page") as url:
        (step,) = browse(npm_folder, url, [{}])
    assert re.search("vocabulary cannot be read.*'BertPreTokenizer'", step["before"]["problem"]), step["before"]


def _edit_manifest(folder, change):
    path = folder / "model/manifest.json"
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda page: _flip(page / "model/onnx/weights.bin"), "its sha256 is not the one"),
        (lambda page: (page / "model/onnx/decode.onnx").write_bytes(b"cut"), "expected .* bytes, got 3"),
        (lambda page: (page / "model/tokenizer.json").unlink(), "could not be loaded"),
        (lambda page: _edit_manifest(page, lambda text: re.sub(r'("schema_version": )\d+', r"\g<1>99", text)), "newer"),
        (lambda page: (page / "page.json").unlink(), "page.json"),
        (lambda page: (page / "runtime/ort-wasm-simd-threaded.wasm").write_bytes(b"\0asm"), "cannot run the model"),
    ],
    ids=["a changed byte", "cut", "missing", "newer", "no page.json", "a runtime that is damaged"],
)
def test_what_is_wrong_is_said_on_the_page(damage, message, site, npm_folder, tmp_path):
    page = shutil.copytree(site, tmp_path / "page")
    damage(page)
    with serving(page) as url:
        (step,) = browse(npm_folder, url, [{}])
    assert re.search(message, step["before"]["problem"]), step["before"]["problem"]
    assert step["before"]["cards"] == []
    assert not step["before"]["usable"]


def test_the_command_writes_a_page(countdown, npm_folder, tmp_path):
    packages = ["--packages", str(npm_folder / "node_modules")]
    done = run(tmp_path, "page", countdown, "-o", "page", *packages, "--json")
    answer = json.loads(done.stdout)
    assert answer["ok"]
    assert answer["model_bytes"] < answer["bytes"]
    settings = json.loads((tmp_path / "page/page.json").read_text())
    assert settings["kind"] == "countdown"
    assert settings["curve"] is None
    again = run(tmp_path, "page", countdown, "-o", "page", *packages)
    assert again.returncode == 2
    assert "pass --overwrite" in again.stderr
    assert run(tmp_path, "page", countdown, "-o", "page", *packages, "--overwrite").returncode == 0


def test_what_cannot_be_written_is_refused(countdown, npm_folder, tmp_path, monkeypatch):
    packages = npm_folder / "node_modules"
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="not a page that bonnx wrote"):
        write_page(countdown, tmp_path / "other", packages=packages, overwrite=True)
    with pytest.raises(ArtifactError, match="not an artifact"):
        write_page(tmp_path / "other", tmp_path / "page", packages=packages)
    with pytest.raises(InputError, match="is missing: expected a folder node_modules"):
        write_page(countdown, tmp_path / "page", packages=tmp_path)
    (tmp_path / "curve.json").write_text("{}")
    with pytest.raises(InputError, match="expected a report of accuracy against N"):
        write_page(countdown, tmp_path / "page", curve=tmp_path / "curve.json", packages=packages)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"npm was not found.*pass --packages"):
        write_page(countdown, tmp_path / "page")
    # Nothing half-written stays.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.json", "other"]

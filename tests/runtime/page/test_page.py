"""The page: what is written, and in Chromium what a visitor sees."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import bonnx
from benchmarks.page import find_chromium, serving
from bonnx.errors import ArtifactError, InputError
from bonnx.models.countdown.puzzle import check, draw_solution, parse_prompt
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
            assert card["coloured"] > 0
            if not card["dropped"]:
                assert (card["note"] == "right") == check(puzzle, card["text"])
    assert "Expected a puzzle such as 3,7,20,24>1: but got 3,7,20" in bad["after"]["problem"]


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

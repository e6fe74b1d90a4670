"""The programs of docs/graphs.md as they stand there: what they print is what bonnx computes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import bonnx
from tests import debian
from tests.checkpoints import make
from tests.exported import export
from tests.npm import PAGE
from tests.tolerance import RUNTIME, within

CANDIDATES = ["24-20=4;7-4=3;3/3=1;", "24/3=8;20-7=13;13-8=1;", "24-20=4;"]
HEADERS = ("onnxruntime_cxx_api.h", "nlohmann/json.hpp")


def program(language):
    """The one program of the page in a language."""
    (code,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return code


def run(command, artifact, prompt, candidates, **options):
    """What a program prints: a JSON object a line."""
    given = prompt if isinstance(prompt, str) else json.dumps(prompt)
    done = subprocess.run(
        [*command, artifact, given, *candidates], capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def refused(command, artifact, prompt, candidates, **options):
    """The error of a program that refuses its arguments."""
    done = subprocess.run(
        [*command, artifact, prompt, *candidates], capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 1, done.stdout
    return done.stderr


def check_ranking(ranked, model, prompt, candidates):
    ranking = model.rank(prompt, candidates)
    assert ranked["best"] == ranking.best
    assert within(np.array(ranked["scores"]), ranking.candidate_scores, RUNTIME)


def check_program(artifact, command, **options):
    """Compare with bonnx on the model that ships."""
    model, prompt = bonnx.load(artifact), "3,7,20,24>1:"
    ranked, generated = run(command, artifact, prompt, CANDIDATES, **options)
    check_ranking(ranked, model, prompt, CANDIDATES)
    result = model.generate(prompt, n=16, seed=0)
    assert (generated["index"], generated["tokens"]) == (result.best_index, result.best.tokens.tolist())
    assert generated["best"] == result.best.text
    assert within(np.array(generated["scores"]), [c.score for c in result.candidates], RUNTIME)
    assert "no token for a piece" in refused(command, artifact, prompt, ["24-20=four;"], **options)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    path = tmp_path_factory.mktemp("python") / "best_of_n.py"
    path.write_text(program("python"), encoding="utf-8")
    return [sys.executable, path]


@pytest.fixture(scope="module")
def node(npm_folder):
    (npm_folder / "best_of_n.mjs").write_text(program("javascript"), encoding="utf-8")
    return [shutil.which("node"), npm_folder / "best_of_n.mjs"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The C++ program, and the environment in which it finds the library."""
    folder = tmp_path_factory.mktemp("cpp")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
    if library is None:
        pytest.skip("this package of ONNX Runtime has no library libonnxruntime.so")
    # The package has it under its version alone.
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    places = [Path("/usr/include/onnxruntime"), Path("/usr/local/include/onnxruntime"), Path("/usr/local/include")]
    installed = [place for place in places if (place / HEADERS[0]).exists()]
    if not installed or not Path("/usr/include", HEADERS[1]).exists():
        debian.unpack(folder, "trixie", ["libonnxruntime-dev", "nlohmann-json3-dev"])
        installed = [folder / "usr/include/onnxruntime", folder / "usr/include"]
    (folder / "best_of_n.cpp").write_text(program("cpp"), encoding="utf-8")
    includes = [word for place in installed for word in ("-I", place)]
    command = [compiler, "-std=c++17", "best_of_n.cpp", *includes, "-L", folder, "-lonnxruntime", "-o", "best_of_n"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [folder / "best_of_n"], {"LD_LIBRARY_PATH": str(folder)}


def test_python(countdown, python):
    check_program(countdown, python)


def test_node(countdown, node):
    check_program(countdown, node)


def test_cpp(countdown, compiled):
    command, environment = compiled
    check_program(countdown, command, env=environment)


def draw_chat(dice):
    words = ["It", "is", "four", "five", "Sure", "Perhaps", "not", "2+2=4", "é", "日"]
    text = lambda: " ".join(dice.choices(words, k=dice.randint(1, 6)))  # noqa: E731
    system = [{"role": "system", "content": text()}] if dice.random() < 0.5 else []
    candidates = [dice.choice(["\n\n", "\n", " "]).join(text() for _ in range(dice.randint(1, 3))) for _ in range(4)]
    return [*system, {"role": "user", "content": text()}], [*candidates, candidates[0] + "<|im_end|>"]


@pytest.mark.parametrize("head", ["reward", "steps", "mlp steps"])
def test_chat_templates_and_steps(head, python, node, tmp_path, dice, rng):
    """Messages, steps that end with a text, and a candidate that ends with a token that `passes_pad` passes over."""
    case = make(tmp_path / "checkpoint", "Llama" if head.startswith("mlp") else "Qwen2", head, rng)
    artifact = export(tmp_path, case.overrides, verification="quick")
    model = bonnx.load(artifact)
    for _ in range(2):
        messages, candidates = draw_chat(dice)
        for prompt in (messages, messages[-1]["content"]):
            check_ranking(*run(python, artifact, prompt, candidates), model, prompt, candidates)
    if head == "reward":
        check_ranking(*run(node, artifact, messages, candidates), model, messages, candidates)
    else:
        assert "steps that end with a token" in refused(node, artifact, "2+2?", candidates)

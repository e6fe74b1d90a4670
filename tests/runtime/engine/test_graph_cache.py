"""The cache of optimized graphs: the same results, files that are shared, and files that are damaged."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import bonnx
from bonnx.errors import InputError
from bonnx.export.artifact import export_model
from bonnx.runtime.artifact.folder import WEIGHTS
from bonnx.runtime.engine import graph_cache
from tests import command_line


@pytest.fixture(scope="module")
def int8(language_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "artifact"
    export_model(language_model, folder, name="tiny", precision="int8", min_agreement=0, verification="quick")
    return folder


def results(model, rng):
    """What rank, the cached prompt, generate and the host's loop compute of one random request."""
    prompt, *candidates = (rng.integers(0, 20, length) for length in rng.integers(1, 12, 5))
    options = {"max_new_tokens": 6, "seed": int(rng.integers(2**32))}
    ranking = model.rank(prompt, candidates)
    model.prepare(prompt)
    cached = model.rank(prompt, candidates)
    whole = model.generate(prompt, n=3, **options)
    *_, steered = model.stream(prompt, n=3, **options)
    found = [cached.candidate_scores, ranking.candidate_scores, ranking.best_index]
    for generation in (whole, steered):
        found += [x for c in generation.candidates for x in (c.tokens, c.scores, c.log_probs)]
    return found


def graphs(cache):
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.onnx")}


@pytest.mark.parametrize("name", ["countdown", "int8"])
def test_results_are_those_without_the_cache_bit_for_bit(name, request, tmp_path, rng):
    artifact, cache = request.getfixturevalue(name), tmp_path / "cache"
    seed = int(rng.integers(2**32))
    expected = results(bonnx.load(artifact, provider="cpu"), np.random.default_rng(seed))
    for _ in range(2):
        found = results(bonnx.load(artifact, provider="cpu", cache_dir=cache), np.random.default_rng(seed))
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_array_equal(a, b)
    # rank, rank_prefill, rank_cached, generate, prefill, decode
    assert len(graphs(cache)) == 6


def test_a_second_load_writes_nothing_and_packed_weights_are_shared_by_the_graphs(countdown, tmp_path):
    model = bonnx.load(countdown, provider="cpu", cache_dir=tmp_path)
    model.rank("3,7>10:", ["3+7=10;"])
    one = sum(path.stat().st_size for path in tmp_path.rglob("weights/*"))
    assert one > (countdown / "onnx" / WEIGHTS).stat().st_size
    model.prepare("3,7>10:")
    model.rank("3,7>10:", ["3+7=10;"])
    assert len(graphs(tmp_path)) == 3
    # The other two graphs read the same weights.
    assert sum(path.stat().st_size for path in tmp_path.rglob("weights/*")) < 1.1 * one
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = bonnx.load(countdown, provider="cpu", cache_dir=tmp_path)
    again.prepare("3,7>10:")
    again.rank("3,7>10:", ["3+7=10;"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "graph", "entry"])
def test_damaged_files_are_made_again(damage, countdown, tmp_path, rng):
    expected = bonnx.load(countdown, provider="cpu", cache_dir=tmp_path).rank("3,7>10:", ["3+7=10;", "7-3=4;"])
    (graph,) = graphs(tmp_path)
    weights = sorted(tmp_path.rglob("weights/*"))
    victim = {"graph": graph, "entry": graph.with_suffix(".json")}.get(damage, weights[rng.integers(len(weights))])
    whole = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(whole[:-1])
    else:
        place = int(rng.integers(len(whole)))
        victim.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    found = bonnx.load(countdown, provider="cpu", cache_dir=tmp_path).rank("3,7>10:", ["3+7=10;", "7-3=4;"])
    np.testing.assert_array_equal(found.candidate_scores, expected.candidate_scores)
    assert [graph_cache.file_digest(path) for path in weights] == [path.name for path in weights]
    assert sorted(tmp_path.rglob("weights/*")) == weights
    assert not [*tmp_path.rglob(".unfinished-*")]


def test_another_processor_has_files_of_its_own(countdown, tmp_path, monkeypatch):
    bonnx.load(countdown, provider="cpu", cache_dir=tmp_path)
    first = graphs(tmp_path)
    monkeypatch.setattr(graph_cache, "processor", lambda: ["another"])
    bonnx.load(countdown, provider="cpu", cache_dir=tmp_path)
    assert len(graphs(tmp_path)) == 2
    assert first.items() <= graphs(tmp_path).items()


def test_processes_that_fill_the_cache_at_once_agree(countdown, tmp_path):
    code = (
        "import sys, bonnx\n"
        "model = bonnx.load(sys.argv[1], provider='cpu', cache_dir=sys.argv[2])\n"
        "print(model.rank('3,7>10:', ['3+7=10;', '7-3=4;']).candidate_scores.tolist())"
    )
    command = [sys.executable, "-c", code, str(countdown), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    expected = bonnx.load(countdown, provider="cpu").rank("3,7>10:", ["3+7=10;", "7-3=4;"]).candidate_scores
    assert printed == {f"{expected.tolist()}\n"}


def test_a_folder_that_cannot_be_written_is_named(countdown, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=r"cache_dir: cannot write to .*file .*choose another folder"):
        bonnx.load(countdown, provider="cpu", cache_dir=file)


def test_the_command_takes_it(countdown, tmp_path):
    command = ["rank", countdown, "--prompt", "3,7>10:", "--candidates", "-", "--json"]
    plain, cached = (
        command_line.run(tmp_path, *command, *more, given="3+7=10;\n7-3=4;\n")
        for more in ([], ["--cache-dir", "cache"])
    )
    assert cached.returncode == 0, cached.stderr
    assert cached.stdout == plain.stdout
    assert len(graphs(tmp_path / "cache")) == 1

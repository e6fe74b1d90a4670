"""One graph with its weights inside."""

import shutil

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import uses_external_data

import bonnx
from bonnx import ArtifactError, ExportError
from bonnx.export import single_file
from bonnx.export.artifact import export_model
from bonnx.models.checkpoint import save_checkpoint
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.rank.request import read_request
from tests.checkpoints import make
from tests.command_line import run
from tests.exported import export
from tests.folded import folded


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def check_inside(path):
    assert not any(uses_external_data(tensor) for tensor in onnx.load(path, load_external_data=False).graph.initializer)


def test_the_command_writes_one_file_of_8_bits(language_model, tmp_path):
    save_checkpoint(language_model, tmp_path / "checkpoint")
    # Of a network of random numbers, 8 bits choose as they like.
    options = ["--verify", "quick", "--min-agreement", "0", "--json"]
    done = run(tmp_path, "export", "--checkpoint", "checkpoint", "-o", "one", "--single-file", *options)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "one") == ["README.md", "golden.npz", "manifest.json", "onnx/generate_int8.onnx"]
    check_inside(tmp_path / "one/onnx/generate_int8.onnx")
    model, checks = bonnx.verify(tmp_path / "one")
    assert {check.case.partition("/")[0] for check in checks} == {"generate"}
    assert model.manifest.agreement is not None
    with pytest.raises(ArtifactError, match=r"has no graph 'rank', only generate; .* without --single-file"):
        model.rank([1, 2], [[3]])
    assert "model.generate(" in (tmp_path / "one/README.md").read_text()


def test_it_generates_what_all_graphs_do(language_model, tiny, tmp_path, dice):
    export_model(language_model, tmp_path / "one", name="tiny", single_file=True, verification="quick")
    prompt = [dice.randrange(130) for _ in range(9)]
    options = {"n": 5, "seed": dice.randrange(2**32), "max_new_tokens": 12}
    ours, whole = (bonnx.load(folder).generate(prompt, **options) for folder in (tmp_path / "one", tiny))
    assert [c.tokens.tolist() for c in ours.candidates] == [c.tokens.tolist() for c in whole.candidates]
    assert [c.score for c in ours.candidates] == [c.score for c in whole.candidates]
    with pytest.raises(ArtifactError, match="no graph"):
        bonnx.load(tmp_path / "one").generate(prompt, n=2, top_log_probs=2)


def test_a_file_without_a_recorded_case(tiny, tmp_path):
    """At int8 there may be no draw that rounding cannot change; then `bonnx verify` checks hashes."""
    copy = shutil.copytree(tiny, tmp_path / "tiny")
    with np.load(copy / "golden.npz") as recorded:
        kept = {key: recorded[key] for key in recorded.files if not key.startswith("generate/")}
    np.savez_compressed(copy / "golden.npz", **kept)
    one = folded(copy, tmp_path / "one", "generate")
    assert files(one) == ["README.md", "manifest.json", "onnx/generate.onnx"]
    model, checks = bonnx.verify(one)
    assert checks == []
    assert len(model.generate([1, 2], n=3, seed=1, max_new_tokens=4).candidates) == 3
    done = run(tmp_path, "verify", "one")
    assert done.returncode == 0, done.stderr


def test_it_ranks_what_all_graphs_do(network, small, tmp_path, rng):
    export_model(network, tmp_path / "one", name="small", single_file="rank", verification="quick")
    assert [name for name in files(tmp_path / "one") if name.endswith(("onnx", "bin"))] == ["onnx/rank.onnx"]
    prompt, *candidates = (rng.standard_normal((length, 12)).astype(np.float32) for length in (6, 3, 5, 1))
    ours, whole = (bonnx.load(folder).rank(prompt, candidates) for folder in (tmp_path / "one", small))
    assert ours.candidate_scores.tolist() == whole.candidate_scores.tolist()


def test_candidates_that_share_no_token_of_the_prompt(tmp_path, rng):
    """Where other artifacts run `score`."""
    case = make(tmp_path / "checkpoint", "Qwen2", "reward", rng)
    whole = bonnx.load(export(tmp_path, case.overrides, verification="quick"))
    engine = open_engine(tmp_path / "out")
    one = bonnx.load(folded(tmp_path / "out", tmp_path / "one", "rank"))
    found = 0
    # The first letters become one token with the prompt.
    for prompt, candidates in [("t", ["he", "here"]), ("i", ["s it", "n"]), ("a", ["nd", "re"]), ("T", ["he", "his"])]:
        ours, wanted = (model.rank(prompt, candidates, aggregation="mean") for model in (one, whole))
        found += not len(read_request(engine, prompt, candidates).prompt)
        np.testing.assert_allclose(ours.candidate_scores, wanted.candidate_scores, rtol=1e-5, atol=1e-6)
    assert found


def test_what_cannot_be_one_file_is_refused(network, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="--single-file generate: this model has no such graph, only score, rank"):
        export_model(network, tmp_path / "one", name="small", single_file="generate")
    monkeypatch.setattr(single_file, "_LARGEST", 10_000)
    with pytest.raises(ExportError, match=r"rank.onnx would have [\d,]+ bytes with its weights, and protobuf takes"):
        export_model(network, tmp_path / "one", name="small", single_file=True)
    assert list(tmp_path.iterdir()) == []
    done = run(tmp_path, "export", "--single-file", "--triton", "models")
    assert done.returncode == 2
    assert "leave out one of them" in done.stderr

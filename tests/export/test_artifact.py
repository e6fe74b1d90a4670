"""Export: what is written, what is refused, and that a failure leaves nothing behind."""

import resource
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import bonnx
from bonnx import ExportError
from bonnx.export import artifact
from bonnx.export.artifact import export_model
from bonnx.export.verify import parity
from bonnx.models import ConfigError, build, load_checkpoint, save_checkpoint
from bonnx.runtime.artifact.folder import read_verified
from bonnx.runtime.artifact.manifest import Scoring
from tests.tolerance import RUNTIME, within

OPTIONS = {
    "opset 18, sliding window, rms norm": (18, {"sliding_window": 4, "final_norm": "rms"}),
    "qk norm, head size, one kv head": (
        23,
        {"qk_norm": True, "head_dim": 6, "num_kv_heads": 1, "attention_bias": False},
    ),
    "linear scorer, labels, rope scaling": (
        23,
        {"scorer_kind": "linear", "num_labels": 3, "rope_theta": 500.0, "sliding_window": 3}
        | {"rope_scaling": {"kind": "llama3", "factor": 4.0, "original_max_positions": 16}},
    ),
    "opset 18, norms on both sides, caps, partial rotation, a layer without": (
        18,
        {"norm_place": "both", "qk_norm": True, "qk_norm_over": "all", "attention_cap": 1.5, "embedding_scale": 3.0}
        | {"rotary_size": 2, "unrotated_layers": [0], "ffn_activation": "gelu_tanh"},
    ),
    "norms behind, two thetas, caps, experts": (
        23,
        {"norm": "layer", "norm_place": "after", "attention_cap": 2.0, "ffn_bias": False, "num_experts": 3}
        | {"sliding_window": 4, "sliding_layers": [0], "sliding_rope_theta": 50.0, "rotary_size": 2},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_the_network_passes_the_verification(name, tmp_path, rng):
    opset, options = OPTIONS[name]
    torch.manual_seed(int(rng.integers(2**31)))
    network = build(embed_dim=16, hidden_size=16, num_layers=2, scorer_hidden=8, scorer_activation="relu", **options)
    label = options.get("num_labels", 1) - 1
    manifest = export_model(
        network.eval(),
        tmp_path / "a",
        name=name,
        opset=opset,
        scoring=Scoring(label=label, aggregation="mean", activation="sigmoid"),
        seed=int(rng.integers(2**31)),
    )
    assert torch.is_grad_enabled()
    assert {p.check for p in manifest.parity} >= {"rank, left padding", "ONNX reference evaluator"}
    assert {graph.opset for graph in manifest.graphs.values()} == {opset}
    prompt, candidate = (rng.standard_normal((n, 16)).astype(np.float32) for n in (9, 5))
    ranking = bonnx.load(tmp_path / "a").rank(prompt, [candidate])
    with torch.no_grad():
        scores = network(torch.from_numpy(np.concatenate([prompt, candidate]))[None])[1][0, 9:, label].sigmoid()
    assert within(ranking.scores[0], scores, RUNTIME)
    assert within(ranking.candidate_scores, scores.mean()[None], RUNTIME)


def test_quickly_verified_means_every_kind_of_check_with_fewer_cases(language_model, tmp_path):
    stages = []
    full, quick = (
        export_model(
            language_model, tmp_path / kind, name=kind, precision="int8", verification=kind, report=stages.append
        )
        for kind in ("full", "quick")
    )
    assert stages[: len(stages) // 2] == [x.replace("20 held-out", "50 held-out") for x in stages[len(stages) // 2 :]]
    cases = {p.check: p.cases for p in full.parity}
    fewer = {p.check: p.cases for p in quick.parity}
    assert fewer.keys() == cases.keys()
    assert all(fewer[check] <= cases[check] for check in cases)
    # With 8-bit inputs as many rows measure the error.
    assert 3 * sum(fewer.values()) < 2 * sum(cases.values())
    assert (full.verification, quick.verification) == ("full", "quick")
    assert (full.agreement.prompts, quick.agreement.prompts) == (50, 20)
    assert "--verify quick" in (tmp_path / "quick" / "README.md").read_text()
    assert "--verify quick" not in (tmp_path / "full" / "README.md").read_text()
    for kind in ("full", "quick"):
        assert bonnx.verify(tmp_path / kind)[1]
    with pytest.raises(ExportError, match="verification: expected one of full, quick; got 'some'"):
        export_model(language_model, tmp_path / "some", name="some", verification="some")


def test_longrope_rotates_each_candidate_by_its_own_length(tmp_path, rng):
    torch.manual_seed(int(rng.integers(2**31)))
    scaling = {"kind": "longrope", "factor": 4.0, "original_max_positions": 12, "attention_factor": 1.2}
    scaling |= {"short_factors": [1.0, 1.1], "long_factors": [2.0, 9.0]}
    network = build(embed_dim=16, hidden_size=16, num_layers=2, scorer_hidden=8, rope_scaling=scaling).eval()
    export_model(network, tmp_path / "a", name="longrope", scoring=Scoring(aggregation="last"))
    model = bonnx.load(tmp_path / "a")
    prompt = rng.standard_normal((9, 16), np.float32)
    # Of 12, 14, 10 and 20 tokens: both sides of the original context in one ranking, and in one vote.
    candidates = [rng.standard_normal((n, 16), np.float32) for n in (3, 5, 1, 11)]
    with torch.no_grad():
        expected = [
            network(torch.from_numpy(np.concatenate([prompt, c]))[None])[1][0, -1, 0].item() for c in candidates
        ]
    ranking = model.rank(prompt, candidates)
    assert within(ranking.candidate_scores, np.array(expected), RUNTIME)
    assert ranking.best_index == int(np.argmax(expected))
    voted = model.rank(prompt, candidates, vote="majority", answers=["a", "b", "c", "b"])
    assert voted.best_index == max((1, 3), key=lambda i: expected[i])
    assert not model.prepare(rng.standard_normal((12, 16), np.float32))


def test_weights_are_stored_once_and_the_operators_are_standard(small, network):
    manifest = read_verified(small)
    weights = sum(p.numel() * 4 for p in network.parameters())
    assert manifest.files["onnx/weights.bin"].size < 1.1 * weights + 4096
    for graph in manifest.graphs.values():
        model = onnx.load(small / graph.file)
        assert {node.domain for node in model.graph.node} == {""}
        assert [entry.domain for entry in model.opset_import] == [""]


def test_an_existing_folder_is_kept_unless_it_may_be_replaced(small, network, tmp_path):
    with pytest.raises(ExportError, match="exists; choose another folder, or pass --overwrite"):
        export_model(network, small, name="again")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ExportError, match="is not an artifact"):
        export_model(network, tmp_path / "mine", name="again", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_a_failed_verification_writes_nothing_and_keeps_the_old_artifact(edited, small, network, monkeypatch):
    before = (edited / "manifest.json").read_bytes()

    def wrong(*_, **__):
        """The right graphs, one of whose weights has changed: what a wrong exporter would make."""
        for name, graph in read_verified(small).graphs.items():
            model = ir.load(small / graph.file)
            if name == "rank":
                weights = model.graph.initializers
                value = next(value for name, value in weights.items() if name.endswith("dense2.weight"))
                value.const_value = ir.tensor(value.const_value.numpy() * 1.01)
            yield name, model

    monkeypatch.setattr(artifact, "trace_graphs", wrong)
    with pytest.raises(ExportError, match="differs from PyTorch by"):
        export_model(network, edited, name="wrong", overwrite=True)
    assert (edited / "manifest.json").read_bytes() == before
    assert [path.name for path in edited.parent.iterdir()] == [edited.name]


def test_another_selection_is_noticed(network, small):
    checker = parity.Checker(network, small, read_verified(small).graphs, Scoring(), read_verified(small).limits)
    rows = checker.draw(3, 2, 4, 1, ragged=False)
    checker.compute()
    feeds = checker.inputs.feeds(rows, "none")
    expected = rows.expected(feeds["candidate_mask"])
    outputs = checker.run_graph("rank", feeds)
    outputs["best_index"] = (outputs["best_index"] + 1) % 4
    with pytest.raises(ExportError, match="the graph selected"):
        checker._same_choice("case", feeds, outputs, expected)


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_no_room_in_the_middle_of_writing(tmp_path):
    command = [sys.executable, "-m", "bonnx", "export", "-o", str(tmp_path / "deep" / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=limit_file_size, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "deep").iterdir()) == []


def test_checkpoints_that_cannot_be_read(network, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the checkpoint.*config\.json"):
        load_checkpoint(tmp_path / "nowhere")
    folder = tmp_path / "checkpoint"
    save_checkpoint(network, folder)
    again, _ = load_checkpoint(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters(), strict=True))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot read the weights"):
        load_checkpoint(folder)
    weights.unlink()
    with pytest.raises(ConfigError, match="cannot read the weights"):
        load_checkpoint(folder)
    weights.write_bytes(whole)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"scorer_hidden": 8', '"scorer_hidden": 9'))
    with pytest.raises(ConfigError, match=r"tensor 'scorer\.dense1\.\w+': expected shape \(9"):
        load_checkpoint(folder)
    (folder / "config.json").write_text(config.replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(ConfigError, match=r"missing: blocks\.2"):
        load_checkpoint(folder)
    (folder / "config.json").write_text(config.replace("scorer_hidden", "scorer_hiden"))
    with pytest.raises(ConfigError, match="did you mean 'scorer_hidden'"):
        load_checkpoint(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_checkpoint(folder)

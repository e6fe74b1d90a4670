"""Gated heads: objectives and scores at every position are those of plain PyTorch, and contradictions are named."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bonnx import InputError
from bonnx.errors import ExportError
from bonnx.export.checkpoint.source import Overrides, read_checkpoint
from bonnx.export.verify.exact import score_rows
from bonnx.models.checkpoint import load_checkpoint
from bonnx.models.config import ConfigError
from bonnx.runtime.selection.gate import last_header
from tests.gated_checkpoints import MESSAGES, make_gated
from tests.tolerance import RUNTIME, within


@pytest.mark.parametrize("kind", ["ArmoRM", "QRM"])
def test_a_gated_head_computes_what_its_makers_compute(kind, tmp_path, rng):
    case = make_gated(tmp_path / "checkpoint", kind, rng)
    checkpoint = read_checkpoint(tmp_path / "checkpoint", Overrides())
    text = case.text(MESSAGES, "It is 4.")
    ids = case.tokenizer(text, add_special_tokens=False, return_tensors="np")["input_ids"]
    score, objectives = case.reward(text)
    assert within(score_rows(checkpoint.model, ids, checkpoint.scoring)[1][0, -1], score, RUNTIME)
    with torch.no_grad():
        assert within(checkpoint.model(torch.from_numpy(ids))[1][0, -1].numpy(), objectives, RUNTIME)
    assert checkpoint.scoring.labels[:2] == ["helpsteer-helpfulness", "helpsteer-correctness"]
    assert len(checkpoint.scoring.labels) == len(objectives)
    assert not checkpoint.model.config.vocabulary_head


@pytest.fixture(scope="module")
def armo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("armo") / "checkpoint"
    make_gated(folder, "ArmoRM", np.random.default_rng(0))
    return folder


@pytest.fixture
def copy(armo, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in armo.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("removed", "fields", "message"),
    [
        ("reward_transform_matrix", {}, "the gated head's tensors do not fit together"),
        ("gating.logit_scale", {}, "the gated head's tensors do not fit together"),
        ("gating.layers.1.weight", {}, "the gated head's tensors do not fit together"),
        ("", {"gating_temperature": 0}, "'gating_temperature': expected a number above 0; found 0"),
        ("", {"model_type": "mistral"}, "known for llama and gemma2; found 'mistral'"),
    ],
)
def test_a_gated_head_that_contradicts_itself_is_refused(copy, removed, fields, message):
    tensors = load_file(copy / "model.safetensors")
    tensors.pop(removed, None)
    save_file(tensors, copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"label": "0"}, "--label: a gate weighs all labels"), ({"activation": "softmax"}, "a gated scorer needs")],
)
def test_options_that_a_gate_has_no_use_for(copy, overrides, message):
    with pytest.raises((InputError, ExportError), match=message):
        read_checkpoint(copy, Overrides(**overrides))


def test_a_gated_head_needs_a_tokenizer_and_no_vocabulary_head(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copy / "model.safetensors")
    checkpoint = read_checkpoint(copy, Overrides())
    assert not checkpoint.model.config.vocabulary_head
    assert any("the vocabulary head is left out" in note for note in checkpoint.remarks)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"looks for the header of a turn, so the checkpoint needs a tokenizer\.json"):
        read_checkpoint(copy, Overrides())


def test_the_last_header_is_found(rng):
    for _ in range(200):
        header = rng.integers(0, 3, rng.integers(1, 4)).tolist()
        row = rng.integers(0, 3, rng.integers(0, 12))
        found = [i for i in range(len(row)) if row[i : i + len(header)].tolist() == header]
        assert last_header(row, header) == max(found, default=-1)

"""Heads of others' classes: the scores at every position are those of plain PyTorch from the same tensors."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from bonnx.export.checkpoint.source import Overrides, read_checkpoint
from bonnx.export.verify.exact import activated
from bonnx.models.checkpoint import load_checkpoint
from bonnx.models.config import ConfigError
from bonnx.models.head_file import read_head_file
from bonnx.models.hub import parse_source
from bonnx.models.opened import open_checkpoint
from tests.checkpoints import ANSWERS, QUESTION
from tests.head_checkpoints import OTHER_HEADS, REWARD_TOKEN, make_other
from tests.tolerance import RUNTIME, within


@pytest.mark.parametrize("name", OTHER_HEADS)
def test_a_head_computes_what_its_makers_compute(name, tmp_path, rng):
    case, head = make_other(tmp_path / "checkpoint", name, rng), OTHER_HEADS[name]
    checkpoint = read_checkpoint(tmp_path / "checkpoint", case.overrides)
    expected, ids = case.scores(QUESTION + ANSWERS[0])
    with torch.no_grad():
        scores = checkpoint.model(torch.from_numpy(ids)[None])[1]
    assert within(activated(scores, checkpoint.scoring)[0].numpy(), expected, RUNTIME)
    assert checkpoint.scoring.aggregation == "last"
    token = case.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
    assert checkpoint.scoring.reward_token == (token if head.appended else None)
    generates = head.causal and not head.appended
    assert checkpoint.model.config.vocabulary_head == generates
    # Only one of the cases has numbers that it does not apply.
    assert any("are not applied" in note for note in checkpoint.remarks) == (name == "score_head, raw (Beaver)")
    assert any("vocabulary head is left out" in note for note in checkpoint.remarks) == (head.causal and head.appended)


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """A checkpoint whose head is not recognized, without its declaration."""
    folder = tmp_path_factory.mktemp("unknown") / "checkpoint"
    make_other(folder, "declared MLP", np.random.default_rng(0))
    return folder


def test_an_unknown_head_is_named_with_the_declaration_that_fits(unknown, tmp_path):
    with pytest.raises(ConfigError, match=r"besides the backbone it has extra\.a .*pass --head with a JSON") as error:
        load_checkpoint(unknown)
    text = str(error.value)
    declared = json.loads(text[text.index("{") :])
    layers = ["reward.first", "reward.middle", "reward.last"]
    assert declared == {"layers": layers, "activation": "relu", "read_at": "last", "unused": ["extra.a", "extra.b"]}
    (tmp_path / "head.json").write_text(json.dumps(declared))
    load_checkpoint(unknown, head=read_head_file(tmp_path / "head.json"))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"layer": ["a"]}, "unknown field 'layer'; did you mean 'layers'"),
        ({"layers": []}, "'layers': expected names of different layers"),
        ({"activation": None}, "'activation': expected one if there are several"),
        ({"activation": "swish"}, "activation"),
        ({"std": 0.0}, "'std': expected a number above 0"),
        ({"temperature": -1.0}, "'temperature': expected a number above 0"),
        ({"mean": float("nan")}, "standardized with the mean nan"),
        ({"mean": 1e39}, r"standardized with the mean 1e\+39"),
        ({"std": 1e-300, "temperature": 1e-300}, r"standard deviation \(times a temperature\) 0\.0"),
        ({"read_at": "steps"}, "expected 'step_text' too"),
        ({"read_at": "steps", "step_text": ""}, "'step_text': expected a text; got an empty one"),
        ({"read_at": "steps", "step_text": "x", "step_split": ""}, "'step_split': expected a text; got an empty one"),
        ({"step_text": "\n"}, "expected 'read_at' to be 'steps'"),
        ({"append": "x", "read_at": "steps", "step_text": "\n"}, "'append': the score is read at"),
        (
            {"layers": ["reward.first", "reward.final"]},
            r"no tensor 'reward\.final\.weight'; besides the backbone there",
        ),
        ({"layers": ["reward.middle", "reward.last"]}, "'reward.middle' reads 12 values; expected the backbone's"),
        ({"layers": ["reward.first", "reward.last", "reward.middle"]}, r"'reward\.middle\.weight': expected a matrix"),
        ({"labels": ["a", "b"]}, "'labels': expected 1 different names"),
        ({"label": "good"}, "'label': expected one of LABEL_0"),
        ({"append": "no such token"}, "has no token 'no such token'"),
        ({"unused": []}, r"2 tensors that a model with this config does not use: extra\.a"),
    ],
)
def test_a_wrong_declaration_is_an_error(unknown, tmp_path, changes, error):
    content = OTHER_HEADS["declared MLP"].declared | changes
    path = tmp_path / "head.json"
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    with pytest.raises(ConfigError, match=error):
        load_checkpoint(unknown, head=read_head_file(path))


def test_a_declaration_reads_steps_and_labels(unknown, tmp_path, rng):
    tensors = load_file(unknown / "model.safetensors")
    tensors["reward.last.weight"], tensors["reward.last.bias"] = torch.randn(2, 12), torch.randn(2)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in unknown.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    layers = OTHER_HEADS["declared MLP"].declared["layers"]
    content = {"layers": layers, "activation": "relu", "unused": ["extra"], "labels": ["bad", "good"], "label": "good"}
    content |= {"score": "softmax", "read_at": "steps", "step_text": "\n"}
    (tmp_path / "head.json").write_text(json.dumps(content))
    scoring = read_checkpoint(folder, Overrides(head=tmp_path / "head.json")).scoring
    assert (scoring.aggregation, scoring.activation, scoring.label) == ("step_last", "softmax", 1)
    assert scoring.steps_from == "--head, 'read_at'"


def test_layers_without_a_module_between_them_are_not_guessed(tmp_path, rng):
    make_other(tmp_path / "checkpoint", "v_head.summary.0, .2 (GRM)", rng)
    path = tmp_path / "checkpoint" / "model.safetensors"
    tensors = {name.replace("summary.2", "summary.1"): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=r"'v_head\.summary\.0' and 'v_head\.summary\.1' have no module between them"):
        load_checkpoint(tmp_path / "checkpoint")
    content = {"layers": ["v_head.summary.0", "v_head.summary.1"], "activation": "relu"}
    (tmp_path / "head.json").write_text(json.dumps(content))
    load_checkpoint(tmp_path / "checkpoint", head=read_head_file(tmp_path / "head.json"))


def test_the_guide_shows_a_declaration_that_works():
    guide = (Path(__file__).parents[2] / "docs" / "reward_models.md").read_text(encoding="utf-8")
    shown = guide[guide.index("```json") + len("```json") :]
    assert json.loads(shown[: shown.index("```")]) == OTHER_HEADS["the guide's declaration"].declared


def test_a_tensor_that_two_files_have_is_an_error(tmp_path, rng):
    make_other(tmp_path / "checkpoint", "value_head.safetensors (LLaMA-Factory)", rng)
    tensors = load_file(tmp_path / "checkpoint/model.safetensors")
    tensors["v_head.summary.weight"] = torch.ones(1, 8)
    save_file(tensors, tmp_path / "checkpoint/model.safetensors")
    with pytest.raises(ConfigError, match=r"tensor 'v_head\.summary\.weight' is in model\.safetensors too"):
        load_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("folder", "fields"),
    [
        ("PairRM", {}),
        ("model", {"architectures": ["DebertaV2PairRM"], "model_type": "deberta-v2"}),
        ("pair-preference-model-LLaMA3-8B", {}),
        ("model", {"_name_or_path": "RLHFlow/pair-preference-model-LLaMA3-8B"}),
        ("model", {"ranker_type": "pairranker"}),
    ],
)
def test_models_of_pairs_are_refused_by_name(unknown, tmp_path, folder, fields):
    (tmp_path / folder).mkdir()
    config = json.loads((unknown / "config.json").read_text())
    (tmp_path / folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ConfigError, match="names a model that reads two candidates"):
        read_checkpoint(tmp_path / folder, Overrides())
    with pytest.raises(ConfigError, match=r"'llm-blender/PairRM' names a model that reads two"):
        parse_source("llm-blender/PairRM")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_value_head_beside_an_adapter_is_read(tmp_path, rng):
    """As LLaMA-Factory writes a reward model that it trained with LoRA."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    case = make_other(base, "value_head.safetensors (LLaMA-Factory)", rng)
    tuned = peft.get_peft_model(case.model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    tuned.save_pretrained(adapter)
    (base / "value_head.safetensors").rename(adapter / "value_head.safetensors")
    model, metadata = load_checkpoint(open_checkpoint(adapter, base=str(base)))
    ids = torch.from_numpy(case.tokenizer(QUESTION, return_tensors="np")["input_ids"])
    with torch.no_grad():
        expected = case.read(tuned.merge_and_unload().model(input_ids=ids).last_hidden_state)
        assert within(model(ids)[1][..., 0].numpy(), expected.numpy(), RUNTIME)
    assert model.config.vocabulary_head
    assert "aggregation" not in metadata["scoring"]

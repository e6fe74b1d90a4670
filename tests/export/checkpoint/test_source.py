"""What an export takes of a checkpoint and of its options: which token, which label, and where scores are read."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from bonnx.command import main
from bonnx.errors import BonnxError, ExportError, InputError
from bonnx.export.artifact import export_model
from bonnx.export.checkpoint.source import Overrides, read_checkpoint
from bonnx.models import ConfigError, save_checkpoint
from bonnx.runtime.artifact.manifest import Scoring
from tests.checkpoints import make
from tests.tolerance import RUNTIME, within

IDS = torch.arange(8, 28)[None]


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A language model that answers with a token, with transformers' own beside."""
    folder = tmp_path_factory.mktemp("causal") / "checkpoint"
    return make(folder, "Qwen2", "step tag", np.random.default_rng(12), tie_word_embeddings=True), folder


@pytest.fixture
def copy(causal, tmp_path):
    return shutil.copytree(causal[1], tmp_path / "checkpoint")


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def add(folder, name, tensor):
    """Put one tensor more beside a model's weights."""
    for path in folder.glob("model*"):
        state = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else {}
        if "model.norm.weight" in state:
            safetensors.torch.save_file(state | {name: tensor}, path)
            return path
    raise AssertionError


def scores(source):
    with torch.no_grad():
        return source.model(IDS)[1][0].numpy()


def test_label_tokens_are_texts_and_ids_have_an_option_of_their_own(causal, copy):
    """ "1" and "0" are tokens of their own; the tokens 1 and 0 are others."""
    case, folder = causal
    texts = [case.tokenizer.convert_tokens_to_ids(text) for text in ("1", "0")]
    assert texts not in ([1, 0], [0, 1])
    with torch.no_grad():
        logits = case.model(IDS).logits[0]
    as_texts = read_checkpoint(folder, Overrides(label_tokens=["1", "0"]))
    as_ids = read_checkpoint(folder, Overrides(label_token_ids=[1, 0]))
    assert within(scores(as_texts), logits[:, texts], RUNTIME)
    assert within(scores(as_ids), logits[:, [1, 0]], RUNTIME)
    # Nothing says that there are steps.
    assert as_texts.scoring.aggregation == "last"
    assert as_texts.scoring.steps_from is None
    stepwise = read_checkpoint(folder, Overrides(label_tokens=["1", "0"], step_text="\n")).scoring
    assert (stepwise.aggregation, stepwise.steps_from) == ("step_last", "--step-text")
    assert stepwise.step_token == case.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    with pytest.raises(ConfigError, match="label tokens: 720 is outside the vocabulary"):
        read_checkpoint(folder, Overrides(label_token_ids=[1, 720]))
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer; pass --label-token-ids"):
        read_checkpoint(copy, Overrides(label_tokens=["1", "0"]))
    assert read_checkpoint(copy, Overrides(label_token_ids=[1, 0])).scoring.aggregation == "last"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"label_tokens": ["1", "123456789"]}, r"'123456789', \d tokens.*--label-token-ids 123456789"),
        ({"label_tokens": ["1", "no such token"]}, r"the text of exactly one token; got 'no such token', \d+ tokens"),
        ({"label_tokens": ["1"]}, "--label-tokens: expected the token that means good and at least one other"),
        ({"label_token_ids": [5]}, "--label-token-ids: expected the token that means good"),
        ({"label_tokens": ["1", "0"], "label_token_ids": [1, 0]}, "expected one of the two"),
        ({"label_token_ids": [7, 7]}, "expected distinct tokens"),
        ({"label_tokens": ["1", "0"], "label": "1"}, "--label: the score is that of the first label token"),
        ({"label_tokens": ["+", "-"], "step_split": "\n\n"}, "--step-split: expected --step-text too"),
        ({"label_tokens": ["+", "-"], "step_text": ""}, "--step-text: expected a text; got an empty one"),
    ],
    ids=["id for a text", "several tokens", "one text", "one id", "texts and ids", "equal", "label", "split", "empty"],
)
def test_labels_and_steps_that_cannot_be_read(overrides, message, causal):
    _, folder = causal
    with pytest.raises(InputError, match=message):
        read_checkpoint(folder, Overrides(**overrides))


def test_labels_of_one_name_need_a_number(copy, tmp_path, rng):
    make(tmp_path / "labels", "Qwen2", "labels", rng)
    edit(tmp_path / "labels", id2label={"0": "same", "1": "other", "2": "same"})
    with pytest.raises(InputError, match="2 labels are named 'same'; pass the label's number"):
        read_checkpoint(tmp_path / "labels", Overrides(label="same"))
    assert read_checkpoint(tmp_path / "labels", Overrides(label="2")).scoring.label == 2
    assert read_checkpoint(tmp_path / "labels", Overrides(label="other")).scoring.label == 1


@pytest.mark.parametrize("name", ["v_head.weight", "v_head.summary.weight"])
def test_a_value_head_is_an_outcome_score_unless_something_says_steps(name, causal, copy, rng):
    case, _ = causal
    weight = torch.from_numpy(rng.standard_normal((1, case.model.config.hidden_size)).astype(np.float32))
    add(copy, name, weight)
    (copy / "model.safetensors.index.json").unlink(missing_ok=True)
    with torch.no_grad():
        raw = case.model.model(IDS).last_hidden_state[0] @ weight.T
    # Tied embeddings are a vocabulary head for a causal model, and for no other.
    for architectures, generates in ((["Qwen2ForValueModel"], False), (["Qwen2ForCausalLM"], True)):
        edit(copy, architectures=architectures)
        source = read_checkpoint(copy, Overrides())
        assert (source.scoring.aggregation, source.scoring.activation) == ("last", "none")
        assert source.scoring.steps_from is source.scoring.step_token is None
        assert source.model.config.vocabulary_head == generates
        assert within(scores(source), raw, RUNTIME)
    scoring = read_checkpoint(copy, Overrides(step_text="\n", activation="sigmoid")).scoring
    assert (scoring.aggregation, scoring.activation, scoring.steps_from) == ("step_last", "sigmoid", "--step-text")
    chosen = read_checkpoint(copy, Overrides(step_text="\n", aggregation="step_min")).scoring
    assert (chosen.aggregation, chosen.activation) == ("step_min", "none")
    edit(copy, architectures=["Qwen2ForPrmModel"])
    process = read_checkpoint(copy, Overrides())
    assert process.scoring.aggregation == "step_last"
    assert process.scoring.activation == "sigmoid"
    assert process.scoring.steps_from == "config.json, 'architectures': Qwen2ForPrmModel"
    assert process.text.step_text == "\n"
    # A process model of a kind whose steps are not known, with the way out.
    edit(copy, architectures=["Qwen2ForProcessRewardModel"])
    with pytest.raises(
        InputError, match=r"aggregation step_last .*ProcessRewardModel.* reads scores at the ends of steps, but noth"
    ):
        read_checkpoint(copy, Overrides())
    assert read_checkpoint(copy, Overrides(step_text="\n")).scoring.aggregation == "step_last"
    assert read_checkpoint(copy, Overrides(aggregation="last")).scoring.aggregation == "last"


def test_a_step_rule_needs_to_know_where_steps_end(causal, copy, language_model, tmp_path):
    _, folder = causal
    labels = Overrides(label_tokens=["+", "-"])
    with pytest.raises(
        InputError, match=r"aggregation step_min \(--aggregation\) reads scores at the ends of steps.*--step-text"
    ):
        read_checkpoint(folder, labels._replace(aggregation="step_min"))
    # Without a tokenizer there is no text whose ends could be found.
    own = tmp_path / "own"
    save_checkpoint(language_model, own)
    with pytest.raises(InputError, match="--step-text: the checkpoint has no tokenizer"):
        read_checkpoint(own, Overrides(step_text="\n"))
    for scoring in ({"aggregation": "step_mean"}, {"aggregation": "step_last", "step_token": None}):
        save_checkpoint(language_model, own, metadata={"scoring": scoring})
        with pytest.raises(
            InputError, match=r"aggregation step_\w+ \(config\.json\) reads scores at the ends of steps"
        ):
            read_checkpoint(own, Overrides())
    save_checkpoint(language_model, own, metadata={"scoring": {"aggregation": "step_mean", "step_token": 3}})
    assert read_checkpoint(own, Overrides()).scoring.steps_from == "config.json, 'scoring': step_token"


def test_a_stated_step_text_replaces_the_config_s_token(causal, copy):
    case, _ = causal
    source = read_checkpoint(copy, Overrides(label_tokens=["+", "-"], step_text="\n"))
    metadata = {"scoring": {"step_token": 5, "aggregation": "step_last"}}
    own = copy.parent / "own"
    save_checkpoint(source.model, own, metadata=metadata, tokenizer_from=copy)
    assert read_checkpoint(own, Overrides()).scoring.step_token == 5
    scoring = read_checkpoint(own, Overrides(step_text="\n")).scoring
    assert scoring.step_token == case.tokenizer("\n", add_special_tokens=False)["input_ids"][0] != 5


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        ({"pad_token": 130}, "scoring pad_token: 130 is outside the vocabulary"),
        ({"end_token": -1}, "scoring end_token: -1 is outside"),
        ({"step_token": 1000}, "scoring step_token: 1000 is outside"),
        ({"stop_tokens": [1, 130]}, r"scoring stop_tokens\[1\]: 130 is outside"),
        ({"label": 1}, "scoring label: expected 0 to 0; got 1"),
        ({"activation": "softmax"}, "activation softmax: the scorer has one label, so every score would be 1"),
    ],
    ids=["pad_token", "end_token", "step_token", "stop_tokens", "label", "activation"],
)
def test_rules_that_the_model_cannot_have(scoring, message, language_model, tmp_path):
    """The same for a checkpoint of ours and for a caller in Python; nothing is written."""
    assert language_model.config.vocab_size == 130
    save_checkpoint(language_model, tmp_path / "own", metadata={"scoring": scoring})
    with pytest.raises(ExportError, match=message):
        read_checkpoint(tmp_path / "own", Overrides())
    with pytest.raises(ExportError, match=message):
        export_model(language_model, tmp_path / "out", name="x", scoring=Scoring(**scoring))
    assert not (tmp_path / "out").exists()
    assert issubclass(ExportError, BonnxError)


def test_the_command_says_what_is_not_followed(causal, copy, capsys):
    edit(copy, mean=0.5, std=2.0)
    arguments = ["export", "--checkpoint", str(copy), "-o", str(copy.parent / "out"), "--dry-run"]
    assert main([*arguments, "--label-tokens", "1", "0"]) == 0
    printed = capsys.readouterr().err
    assert "note: config.json, 'mean' and 'std' of rewards are not applied" in printed
    assert main([*arguments, "--label-token-ids", "1", "0"]) == 0

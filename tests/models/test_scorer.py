"""The recipe for a scorer: from a language model as transformers writes it to an artifact that generates."""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import bonnx
from bonnx.command import main
from bonnx.export.checkpoint.source import Overrides, read_checkpoint
from bonnx.export.checkpoint.tokenizer import read_tokenizer
from bonnx.models import ConfigError, draw_examples, load_checkpoint, save_checkpoint, train_scorer
from tests.checkpoints import FAMILIES, QUESTION, class_of, make, make_tokenizer
from tests.tolerance import RUNTIME, within

DOCUMENT = Path(__file__).parents[2] / "docs" / "scorer.md"
STOP = 4


def language_model(folder, family, rng):
    """A causal model whose outputs still tell the last token: fresh weights, a small vocabulary."""
    torch.manual_seed(int(rng.integers(2**31)))
    kind = "spaces" if family in ("Llama", "Mistral") else "bytes"
    config = class_of(family, "Config")(
        vocab_size=720,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        eos_token_id=STOP,
        pad_token_id=None,
        tie_word_embeddings=bool(rng.integers(2)),
    )
    class_of(family, "ForCausalLM")(config).save_pretrained(folder)
    make_tokenizer(kind).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path, rng):
    return language_model(tmp_path / "language", FAMILIES[rng.integers(4)], rng)


def sides(model, rng):
    """A class for each token: its side of a random plane through the embeddings."""
    return (model.embedding.weight @ torch.from_numpy(rng.standard_normal(32).astype(np.float32)) > 0).tolist()


def draw(model, rng, label, prompts=80, max_new_tokens=5):
    drawn = [rng.integers(8, 460, int(rng.integers(2, 8))).tolist() for _ in range(prompts)]
    seed = int(rng.integers(2**31))
    return draw_examples(model, drawn, label, n=12, max_new_tokens=max_new_tokens, stop_tokens=[STOP, 5], seed=seed)


@torch.no_grad()
def last_scores(model, examples):
    return np.array([model(torch.tensor([[*p, *c]]))[1][0, -1, 0].item() for p, c, _ in examples])


def ranked_right(scores, labels):
    """The share of pairs, one good and one bad, in which the good one has the higher score; chance is 0.5."""
    labels = np.array(labels)
    return (scores[labels == 1][:, None] > scores[labels == 0]).mean()


def test_a_trained_scorer_ranks_exports_and_generates(checkpoint, tmp_path, rng):
    model, metadata = load_checkpoint(checkpoint, new_scorer=True)
    good = sides(model, rng)
    examples = draw(model, rng, lambda prompt, completion: [float(good[token]) for token in completion])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    losses = train_scorer(model, examples[:-240], steps=300, progress=lambda *step: seen.append(step))
    assert seen == list(enumerate(losses, 1))
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:20])
    assert ranked_right(last_scores(model, examples[-240:]), [labels[-1] for *_, labels in examples[-240:]]) > 0.8
    # The language model is what it was, bit for bit.
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("network.scorer"), name

    save_checkpoint(model, tmp_path / "scorer", metadata=metadata, tokenizer_from=checkpoint)
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main(["export", "--checkpoint", str(tmp_path / "scorer"), "-o", str(tmp_path / "onnx")])
    assert code == 0, errors.getvalue()
    artifact = bonnx.load(tmp_path / "onnx")
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "user", "content": QUESTION}]
    chat = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    for prompt, ids in ((QUESTION, theirs(QUESTION)["input_ids"]), (messages, chat)):
        result = artifact.generate(prompt, n=8, max_new_tokens=12, seed=0)
        assert result.prompt_tokens == len(ids)
        with torch.no_grad():
            for candidate in result.candidates:
                scores = model(torch.tensor([[*ids, *candidate.tokens.tolist()]]))[1][0, len(ids) :, 0].sigmoid()
                assert within(candidate.scores, scores.numpy(), RUNTIME)
                assert candidate.score == candidate.scores[-1]
        assert result.best.score == max(candidate.score for candidate in result.candidates)


def test_one_label_counts_for_every_token(checkpoint, rng):
    model, _ = load_checkpoint(checkpoint, new_scorer=True)
    good = sides(model, rng)
    examples = draw(model, rng, lambda prompt, completion: float(good[completion[0]]), max_new_tokens=1)
    outcome = train_scorer(model, examples, steps=60, batch_size=32)
    weights = {name: value.clone() for name, value in model.network.scorer.state_dict().items()}
    spread = [(prompt, completion, [label] * len(completion)) for prompt, completion, label in examples]
    torch.rand(7)
    assert train_scorer(model, spread, steps=60, batch_size=32) == outcome
    assert all(torch.equal(value, weights[name]) for name, value in model.network.scorer.state_dict().items())
    assert train_scorer(model, spread, steps=60, batch_size=32, seed=1) != outcome


def test_tokens_without_a_label_teach_nothing(checkpoint, rng):
    """Labels are where the last token is, whatever lies before it."""
    model, _ = load_checkpoint(checkpoint, new_scorer=True)
    good, nan = sides(model, rng), float("nan")
    examples = draw(model, rng, lambda p, c: [nan] * (len(c) - 1) + [float(good[c[-1]])])
    train_scorer(model, examples[:-240], steps=300)
    share = ranked_right(last_scores(model, examples[-240:]), [labels[-1] for *_, labels in examples[-240:]])
    assert share > 0.75
    unlabelled = [(p, c, [nan] * len(c)) for p, c, _ in examples[:50]]
    a = train_scorer(model, examples[:100], steps=20)
    assert train_scorer(model, unlabelled + examples[:100], steps=20) == a


def test_features_of_any_size_train_alike(checkpoint, rng):
    """A few features of language models are hundreds of times as large as the rest, and some are constant."""
    model, _ = load_checkpoint(checkpoint, new_scorer=True)
    good = sides(model, rng)
    examples = draw(model, rng, lambda prompt, completion: [float(good[token]) for token in completion])
    plain = train_scorer(model, examples, steps=100)
    scores = last_scores(model, examples[:50])
    with torch.no_grad():
        model.network.final_norm.weight.mul_(300.0)
    assert within(train_scorer(model, examples, steps=100), plain, (1e-2, 1e-3))
    assert within(last_scores(model, examples[:50]), scores, (5e-2, 5e-2))
    with torch.no_grad():
        model.network.final_norm.weight[:5] = 0.0
    assert np.isfinite(train_scorer(model, examples, steps=20)).all()
    assert np.isfinite(last_scores(model, examples[:50])).all()


def test_completions_end_at_the_first_stop_token(checkpoint, rng):
    model, _ = load_checkpoint(checkpoint, new_scorer=True)
    calls = []
    prompts = [[9, 10], [11, 12, 13]]
    stops = list(range(0, 720, 5))
    drawn = draw_examples(
        model, prompts, lambda *ids: calls.append(ids) or 0.5, n=30, max_new_tokens=9, stop_tokens=stops, seed=3
    )
    assert [example[:2] for example in drawn] == calls
    assert [prompt for prompt, *_ in drawn] == [prompt for prompt in prompts for _ in range(30)]
    ends = [[i for i, token in enumerate(completion) if token in stops] for _, completion, _ in drawn]
    assert all(end == [len(c) - 1] or (not end and len(c) == 9) for end, (_, c, _) in zip(ends, drawn, strict=True))
    assert len({len(completion) for _, completion, _ in drawn}) > 3
    again = draw_examples(model, prompts, lambda *_: 0.5, n=30, max_new_tokens=9, stop_tokens=stops, seed=3)
    assert again == drawn


WRONG = {
    "length": ([0.0, 1.0], "example 1: expected one label, or 3 for its tokens; got 2"),
    "range": ([0.0, -1.0, 0.5], "example 1: expected labels from 0 to 1, or NaN for none; got -1"),
    "nothing": (float("nan"), "none of the 2 examples has a label"),
}


@pytest.mark.parametrize("name", WRONG)
def test_labels_that_mean_nothing(name, checkpoint):
    labels, message = WRONG[name]
    model, _ = load_checkpoint(checkpoint, new_scorer=True)
    before = model.network.scorer.dense1.weight.clone()
    with pytest.raises(ValueError, match=re.escape(message)):
        train_scorer(model, [([8], [9], float("nan")), ([8], [9, 10, 11], labels)])
    assert torch.equal(model.network.scorer.dense1.weight, before)


def test_a_scorer_of_several_labels_is_refused(tmp_path, rng):
    make(tmp_path / "c", "Qwen2", "labels", rng)
    model, _ = load_checkpoint(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"num_labels: expected 1.*got 3"):
        train_scorer(model, [([8], [9], 1.0)])


# transformers has no classes for InternLM2, nor a tokenizer.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "InternLM2"])
def test_a_saved_checkpoint_has_the_tokens_and_the_rules_of_the_first(family, tmp_path, rng):
    first = language_model(tmp_path / "language", family, rng)
    model, metadata = load_checkpoint(first, new_scorer=True)
    save_checkpoint(model, tmp_path / "a", metadata=metadata, tokenizer_from=first)
    # Once more, from a checkpoint that is ours already.
    model, metadata = load_checkpoint(tmp_path / "a")
    save_checkpoint(model, tmp_path / "b", metadata=metadata, tokenizer_from=tmp_path / "a")
    expected, theirs = read_tokenizer(first), transformers.AutoTokenizer.from_pretrained(first)
    for folder in (tmp_path / "a", tmp_path / "b"):
        files, source = read_tokenizer(folder), read_checkpoint(folder, Overrides())
        assert files.json == expected.json
        assert (files.chat_template, files.special_tokens) == (expected.chat_template, expected.special_tokens)
        ours = tokenizers.Tokenizer.from_buffer(files.json)
        for text in (QUESTION, "It's 12345 + 6.\n\n  <|im_end|> \u65e5"):
            assert ours.encode(text).ids == theirs(text)["input_ids"]
        assert (source.scoring.activation, source.scoring.stop_tokens) == ("sigmoid", [STOP])
        assert (source.limits.max_tokens, source.text.unknown) == (128, "replace")
    if family == "Qwen2":
        # The family counts: without it the tokens would be others.
        config = json.loads((tmp_path / "a" / "config.json").read_text())
        del config["tokenizer"]
        (tmp_path / "a" / "config.json").write_text(json.dumps(config))
        assert read_tokenizer(tmp_path / "a").json != expected.json


def test_a_folder_without_a_tokenizer_and_the_first_folder_are_refused(checkpoint, tmp_path):
    model, _ = load_checkpoint(checkpoint, new_scorer=True)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(ConfigError, match="would replace the one that it was made from"):
        save_checkpoint(model, checkpoint, tokenizer_from=checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        save_checkpoint(model, tmp_path / "new", tokenizer_from=checkpoint)
    assert not (tmp_path / "new").exists()


def test_the_documented_example_runs(tmp_path, rng, monkeypatch, capsys):
    language_model(tmp_path / "my-model", FAMILIES[rng.integers(4)], rng)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    for full, quick in (("range(500)", "range(6)"), ("max_new_tokens=256", "max_new_tokens=8"), ("[-1600:]", "[-16:]")):
        assert full in code
        code = code.replace(full, quick)
    exec(code.replace("[:-1600]", "[:-16]"), {})
    assert "held-out" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "my-scorer", Overrides()).tokenizer is not None

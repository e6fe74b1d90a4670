"""The recipe: deterministic, resumable, and its shipped result is what the report says."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bonnx.models import load_checkpoint
from bonnx.models.countdown import CHECKPOINT, train
from bonnx.models.countdown.evaluate import METHODS, best_of, calibration, draw, evaluate, report
from bonnx.models.countdown.puzzle import Puzzle, check, draw_puzzles
from bonnx.models.countdown.run import TrainingRun
from bonnx.models.countdown.vocabulary import END, PAD, STEP, decode, encode
from bonnx.models.decoding import Cache, forward_cached, sample

SHORT = {"language_steps": 2, "joint_steps": 2, "spoiled_steps": 2, "rows": 8, "size": "small"}


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train.train(folder, **SHORT, seed=5)
    return weights(folder)


def test_shipped_weights_do_what_the_report_says(tmp_path):
    stated = json.loads((CHECKPOINT / "report.json").read_text())
    model, _ = load_checkpoint(CHECKPOINT)
    assert stated["puzzles"] >= 500
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 8_000_000
    assert (CHECKPOINT / "report.md").read_text() == report(stated)
    measured = evaluate(model, puzzles=60, samples=16, seed=random.randrange(1000))
    tables = [{(row["n"], row["method"]): row for row in result["accuracy"]} for result in (stated, measured)]
    for method in METHODS:
        rows = [table[16, method] for table in tables]
        # 60 fresh puzzles against 600: within four of the smaller sample's half intervals.
        half = (rows[1]["high"] - rows[1]["low"]) / 2 + 0.02
        assert abs(rows[0]["accuracy"] - rows[1]["accuracy"]) < 2 * half, method
    assert tables[1][16, METHODS[1]]["accuracy"] > tables[1][16, METHODS[0]]["accuracy"] + 0.15
    draw(measured, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(whole, tmp_path, monkeypatch, stop):
    """Stopped in each phase and between them."""
    with monkeypatch.context() as patch:
        advance = TrainingRun.advance

        def interrupted(run, loss, rate):
            if run.step == stop:
                raise KeyboardInterrupt
            advance(run, loss, rate)

        patch.setattr(TrainingRun, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(tmp_path, **SHORT, seed=5, save_every=1)
    train.train(tmp_path, **SHORT, seed=5, save_every=1)
    parts = weights(tmp_path)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(SystemExit, match="was started with --seed 5"):
        train.train(tmp_path, **SHORT, seed=6)


def test_another_seed_gives_another_model(tmp_path):
    options = {"language_steps": 1, "joint_steps": 1, "spoiled_steps": 1, "rows": 8, "size": "default"}
    models = [train.train(tmp_path / str(seed), **options, seed=seed).state_dict() for seed in (5, 6)]
    assert any(not torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_labels_of_a_completion():
    completion = [*encode("12+3=15;15*7=106;106-25=98;"), END, PAD]
    labels = train.label(Puzzle((3, 7, 12, 25), 98), completion)
    marked = {i: value for i, value in enumerate(labels) if value != train.IGNORED}
    assert [completion[i] for i in marked] == [STEP, STEP, STEP, END]
    assert list(marked.values())[1:] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "right"),
    [("12+3=15;15*7=105;105-25=80;", 1.0), ("12+3=15;15*7=105;105-25=81;", 0.0)],
    ids=["right", "wrong"],
)
def test_outcome_labels_are_the_whole_completions(text, right):
    completion = [*encode(text), END, PAD]
    labels = train.label(Puzzle((3, 7, 12, 25), 80), completion, "outcome")
    marked = {i: value for i, value in enumerate(labels) if value != train.IGNORED}
    assert [completion[i] for i in marked] == [STEP, STEP, STEP, END]
    assert set(marked.values()) == {right}


def test_a_run_of_another_size_is_refused(tmp_path):
    train.train(tmp_path, **SHORT, seed=5)
    with pytest.raises(SystemExit, match="pass the same --size"):
        train.train(tmp_path, **SHORT | {"size": "default"}, seed=5)


def test_spoiled_completions_are_never_right(dice):
    ended_early = changed = 0
    for puzzle, solution in draw_puzzles(dice, 4, 200, test=False):
        completion = [*encode(solution), END, PAD, PAD]
        spoiled = train.spoil(dice, completion)
        assert len(spoiled) == len(completion)
        written = spoiled[: spoiled.index(END)]
        assert set(spoiled[len(written) + 1 :]) <= {PAD}
        if written == completion[: len(written)]:
            ended_early += 1
            complete = len(written) == len(encode(solution))  # the token drawn was the one that stood there
            assert complete or train.label(puzzle, spoiled)[len(written)] == 0.0
        else:
            changed += 1
            assert sum(a != b for a, b in zip(spoiled, completion, strict=True)) == 1
    assert ended_early > changed > 20


def test_solved_batch_learns_the_completion_only():
    inputs, targets = train.solved_batch(random.Random(0), 8)
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        text = decode([t for t in row if t != PAD])
        prompt, completion = text.split(":")
        assert decode([t for t in target if t != train.IGNORED]) == completion
        assert completion.endswith(";\n")
        assert check(Puzzle(tuple(map(int, prompt.split(">")[0].split(","))), int(prompt.split(">")[1])), completion)


def test_cached_decoding_equals_the_whole_forward():
    model, _ = load_checkpoint(CHECKPOINT)
    ids = torch.randint(0, 1000, (3, 12))
    cache = Cache(model, 3, 12, torch.float32)
    with torch.no_grad():
        parts = [forward_cached(model, ids[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 12))]
        assert torch.allclose(torch.cat(parts, 1), model(ids)[0], atol=2e-5)


def test_samples_follow_the_models_distribution():
    model, _ = load_checkpoint(CHECKPOINT)
    prompt = torch.tensor([encode("3,7,12,25>98:")])
    drawn = sample(model, prompt.expand(4000, -1), 1, END, PAD, torch.Generator().manual_seed(0))[:, 0]
    with torch.no_grad():
        expected = model(prompt)[2][0, -1].softmax(-1)
    frequency = torch.bincount(drawn, minlength=len(expected)) / 4000
    assert (frequency - expected).abs().max() < 0.04


def test_the_methods_on_a_known_case():
    texts, scores = ["a", "b", "b", "c"], np.array([0.1, 0.2, 0.3, 0.9], np.float32)
    assert best_of(4, texts, scores, np.array([False, False, False, True])) == [0.25, 1.0, 0.0, 1.0]
    assert best_of(4, texts, scores, np.array([False, True, True, False])) == [0.5, 0.0, 1.0, 1.0]
    assert best_of(2, texts, scores, np.array([True, False, False, True])) == [0.5, 0.5, 0.5, 1.0]


def test_calibration_of_known_probabilities():
    scores, right = np.array([0.05] * 100 + [0.95] * 100), np.array([False] * 100 + [True] * 90 + [False] * 10)
    measured = calibration(scores, right)
    assert measured["bins"] == [(pytest.approx(0.05), 0.0, 100), (pytest.approx(0.95), 0.9, 100)]
    assert measured["expected_calibration_error"] == pytest.approx(0.05)

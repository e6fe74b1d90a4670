"""The recipe for revisions: what is shown, what is learned, and that a stopped run goes on."""

import pytest
import torch
from safetensors.torch import load_file

from bonnx.models import load_checkpoint
from bonnx.models.countdown import CHECKPOINT
from bonnx.models.countdown.puzzle import check, draw_puzzles, held_out, parse_prompt
from bonnx.models.countdown.revise import MEMORY, chain_batch, distance, revise, revision, revision_batch
from bonnx.models.countdown.run import TrainingRun
from bonnx.models.countdown.train import IGNORED, label
from bonnx.models.countdown.vocabulary import END, PAD, decode, encode


@pytest.fixture(scope="module")
def base():
    return load_checkpoint(CHECKPOINT)[0]


def slow_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    same = slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(same, slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1)


def test_distance_is_the_recursion(dice):
    for _ in range(40):
        a, b = ([dice.randrange(3) for _ in range(dice.randrange(6))] for _ in range(2))
        assert distance(a, b) == slow_distance(a, b)


def test_wrong_attempts_are_shown_and_the_nearest_is_last(dice):
    for puzzle, solution in draw_puzzles(dice, 4, 60, test=False):
        right = [*encode(solution), END]
        attempts = []
        for _ in range(dice.randrange(8)):
            changed = list(right)
            for _ in range(dice.randrange(4)):
                changed[dice.randrange(len(changed) - 1)] = dice.randrange(1, 100)
            attempts.append(changed)
        shown, target = revision(dice, puzzle, solution, attempts)
        assert check(puzzle, decode(target))
        assert len(shown) <= MEMORY
        assert all(not check(puzzle, decode(attempt)) and attempt in attempts for attempt in shown)
        if shown:
            assert distance(shown[-1], target) == min(distance(attempt, target) for attempt in shown)
        if any(check(puzzle, decode(attempt)) for attempt in attempts):
            assert target in attempts


def test_only_the_right_attempt_is_learned(base, dice):
    inputs, targets = revision_batch(base, dice, 12)
    for row, learned in zip(inputs.tolist(), targets.tolist(), strict=True):
        written = row[: row.index(PAD)] if PAD in row else row
        prompt, *attempts = decode(written).replace(":", ":\x00", 1).split("\x00")
        puzzle = parse_prompt(prompt)
        assert not held_out(puzzle)
        attempts = attempts[0].rstrip("\n").split("\n")
        assert check(puzzle, attempts[-1])
        assert not any(check(puzzle, attempt) for attempt in attempts[:-1])
        places = [i for i, token in enumerate(learned) if token != IGNORED]
        assert [learned[i] for i in places] == [*encode(attempts[-1]), END]
        assert [row[i + 1] for i in places] == [learned[i] for i in places]


def test_each_attempt_of_a_chain_is_labelled_by_itself(base, dice):
    ids, labels = chain_batch(base, dice, 3, 8)
    for row, labelled in zip(ids.tolist(), labels.tolist(), strict=True):
        start = row.index(encode(":")[0]) + 1
        puzzle = parse_prompt(decode(row[:start]))
        assert set(labelled[:start]) == {IGNORED}
        while start < len(row):
            end = row.index(END, start) + 1
            assert labelled[start:end] == label(puzzle, row[start:end])
            start = end


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    revise(tmp_path / "whole", steps=2, rows=4, seed=3)
    with monkeypatch.context() as patch:
        advance = TrainingRun.advance

        def interrupted(run, loss, rate):
            if run.step == 1:
                raise KeyboardInterrupt
            advance(run, loss, rate)

        patch.setattr(TrainingRun, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            revise(tmp_path / "parts", steps=2, rows=4, seed=3, save_every=1)
    revise(tmp_path / "parts", steps=2, rows=4, seed=3, save_every=1)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

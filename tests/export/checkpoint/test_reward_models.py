"""Reward models from checkpoint to winner: text, messages and steps give what transformers gives for the whole text."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bonnx import InputError
from bonnx.export.checkpoint.source import read_checkpoint
from bonnx.models import ConfigError
from bonnx.runtime.artifact.folder import read_verified
from tests.checkpoints import ANSWERS, QUESTION, make, rewards
from tests.exported import exported
from tests.tolerance import RUNTIME, within

ROOT = Path(__file__).resolve().parents[3]
CHAT = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """One label, read at the last token; pad = eos; a tokenizer that begins every text with `<s>`."""
    folder = tmp_path_factory.mktemp("reward")
    case = make(folder / "checkpoint", "Llama", "reward", np.random.default_rng(5), num_hidden_layers=1)
    return case, exported(folder, case.overrides)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Two labels, read at `<extra_0>` behind each step."""
    folder = tmp_path_factory.mktemp("steps")
    case = make(folder / "checkpoint", "Qwen2", "mlp steps", np.random.default_rng(6), num_hidden_layers=1)
    return case, exported(folder, case.overrides)


def test_ranking_gives_the_scores_of_whole_texts_wherever_the_border_lies(reward, rng):
    case, model = reward
    for _ in range(6):
        # Borders inside of what the tokenizer merges, down to a prompt of one character.
        text = QUESTION + ANSWERS[int(rng.integers(3))]
        cut = int(rng.integers(1, len(text) - 1))
        prompt, candidates = text[:cut], [text[cut:], text[cut:] + " Sure.", "\u00e9\U0001f600 " + text[cut:]]
        scores = [case.scores(prompt + c) for c in candidates]
        ranking = model.rank(prompt, candidates)
        assert within(ranking.candidate_scores, [s[-1] for s, _ in scores], RUNTIME)
        for name in ("mean", "min", "max"):
            aggregated = model.rank(prompt, candidates, aggregation=name)
            for n, candidate in enumerate(candidates):
                spans = case.tokenizer(prompt + candidate, return_offsets_mapping=True)["offset_mapping"]
                own = scores[n][0][[end > len(prompt) for _, end in spans]]
                assert within(aggregated.candidate_scores[n], getattr(own, name)(), RUNTIME)
                assert within(aggregated.scores[n], own, RUNTIME)


def test_a_pad_token_that_ends_a_text_is_passed_over_as_in_transformers(reward):
    case, model = reward
    ended = [answer + "<|im_end|>" for answer in ANSWERS]
    whole = [case.scores(QUESTION + answer)[0] for answer in ended]
    assert within(model.rank(QUESTION, ended).candidate_scores, [scores[-2] for scores in whole], RUNTIME)


def test_messages_go_through_the_template(reward):
    case, model = reward
    turns = [{"role": "assistant", "content": answer} for answer in ANSWERS]
    texts = [case.tokenizer.apply_chat_template([*CHAT, turn], tokenize=False) for turn in turns]
    expected = [case.reward(text, special=False) for text in texts]
    assert within(model.rank(CHAT, ANSWERS).candidate_scores, expected, RUNTIME)
    assert within(model.rank(CHAT, [[turn] for turn in turns]).candidate_scores, expected, RUNTIME)
    assert within(model.score([[*CHAT, turn] for turn in turns]).row_scores, expected, RUNTIME)
    opening = case.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    unfinished = [case.scores(opening + answer, special=False)[0][-1] for answer in ANSWERS]
    assert within(model.rank(CHAT, ANSWERS, partial=True).candidate_scores, unfinished, RUNTIME)
    with pytest.raises(InputError, match="'role'"):
        model.rank([{"content": "x"}], ANSWERS)


def test_steps_are_found_in_the_text(steps):
    case, model = steps
    answer = "Add 2.\n\nThen add 2 more.\n\nIt is 4."
    whole = QUESTION + "".join(step + "<extra_0>" for step in answer.split("\n\n"))
    scores, ids = case.scores(whole)
    expected = scores[ids == case.tokenizer.convert_tokens_to_ids("<extra_0>")]
    assert len(expected) == 3
    for candidate in (answer, answer.split("\n\n")):
        ranking = model.rank(QUESTION, [candidate, "It is 5."], aggregation="step_min")
        assert within(ranking.step_scores[0], expected, RUNTIME)
        assert within(ranking.candidate_scores[0], expected.min(), RUNTIME)
        assert len(ranking.step_scores[1]) == 1
    with pytest.raises(InputError, match="no steps"):
        model.rank(QUESTION, [" \n\n "])


def test_only_the_prompt_is_cut_and_only_when_asked(reward):
    case, model = reward
    limit = model.manifest.limits.max_tokens
    prompt = "word " * limit
    with pytest.raises(InputError, match="this artifact takes at most"):
        model.rank(prompt, ANSWERS)
    ranking = model.rank(prompt, ANSWERS, truncate=True)
    ids = [case.tokenizer(prompt + answer)["input_ids"] for answer in ANSWERS]
    assert ranking.cut == max(map(len, ids)) - limit
    rows = [[row[0], *row[1 + ranking.cut :]] for row in ids]
    assert within(ranking.candidate_scores, model.score(rows).row_scores, RUNTIME)
    with pytest.raises(InputError, match="a candidate is never cut"):
        model.rank("a prompt", [prompt], truncate=True)


def test_the_commands(tmp_path, rng):
    """From a folder away from the source: export of a checkpoint, and its ranking as JSON."""
    case = make(tmp_path / "checkpoint", "Mistral", "steps", rng, sliding_window=9)
    command = [sys.executable, str(ROOT / "export.py"), "--checkpoint", "checkpoint", "-o", "out"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "candidates.json").write_text(json.dumps(ANSWERS))
    command = [sys.executable, "-m", "bonnx", "rank", "out", "--prompt", QUESTION]
    done = subprocess.run(
        [*command, "--candidates", "candidates.json", "--json"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    printed, expected = json.loads(done.stdout), rewards(case)
    assert within(printed["candidate_scores"], expected, RUNTIME)
    assert printed["order"] == list(np.argsort(-expected))
    # Where a token holds several ends of lines, it is one reading.
    assert all(1 <= len(s) <= answer.count("\n") for s, answer in zip(printed["step_scores"], ANSWERS, strict=True))
    manifest = read_verified(tmp_path / "out")
    assert manifest.text.checked_against is not None
    assert manifest.scoring.steps_from == "config.json, 'architectures': MistralForTokenClassification"
    assert set(manifest.graphs) == {"score", "rank", "rank_prefill", "rank_cached"}


def test_what_is_refused_before_anything_is_written(tmp_path, rng):
    case = make(tmp_path / "checkpoint", "Llama", "labels", rng)
    with pytest.raises(InputError, match=r"3 labels .*score with --label"):
        read_checkpoint(tmp_path / "checkpoint", case.overrides._replace(label=None))
    with pytest.raises(InputError, match="--label: expected one of bad, fair, good"):
        read_checkpoint(tmp_path / "checkpoint", case.overrides._replace(label="best"))
    assert read_checkpoint(tmp_path / "checkpoint", case.overrides).scoring.label == 2
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    (tmp_path / "checkpoint" / "chat_template.jinja").write_text("{% for %}")
    command = [sys.executable, str(ROOT / "export.py"), "--checkpoint", "checkpoint", "-o", "out", "--label", "good"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "chat template" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config | {"model_type": "gemma3"}))
    with pytest.raises(ConfigError, match="'model_type'"):
        read_checkpoint(tmp_path / "checkpoint", case.overrides)

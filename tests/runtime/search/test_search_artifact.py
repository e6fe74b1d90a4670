"""Search on artifacts: the same tokens as `generate`, the costs, policies, and what the command prints."""

import json
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import torch

import bonnx
from bonnx import InputError
from bonnx.models import load_checkpoint
from bonnx.models.countdown import CHECKPOINT
from bonnx.models.countdown.puzzle import check, parse_prompt
from bonnx.models.countdown.vocabulary import END, decode, encode
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.search import Choice, Policy, cross_validated, fit_policy, revisions
from tests.tolerance import RUNTIME, within

PUZZLE = "3,7,12,25>98:"


@pytest.fixture(scope="module")
def puzzler(countdown):
    return bonnx.load(countdown)


def sequences(result):
    return [candidate.tokens.tolist() for candidate in result.candidates]


def test_sampling_gives_the_tokens_of_generate(puzzler, rng):
    seed = int(rng.integers(2**31))
    generated = puzzler.generate(PUZZLE, n=12, seed=seed)
    found = puzzler.search(PUZZLE, "best_of_n", 12, seed=seed)
    assert sequences(found) == sequences(generated)
    assert found.best_index == generated.best_index
    assert found.best.text == generated.best.text
    assert found.cost.computed_tokens == generated.computed_tokens == found.cost.sampled_tokens
    assert found.cost.prompt_tokens == generated.prompt_tokens
    for ours, theirs in zip(found.candidates, generated.candidates, strict=True):
        assert within(ours.scores, theirs.scores, RUNTIME)
        assert within(ours.log_probs, theirs.log_probs, RUNTIME)
        assert ours.finish_reason == theirs.finish_reason


@pytest.mark.parametrize("every", [1, 5, 12])
def test_pruning_gives_the_tokens_of_generate(puzzler, rng, every):
    seed, keep = int(rng.integers(2**31)), float(rng.uniform(0.3, 0.9))
    generated = puzzler.generate(PUZZLE, n=12, seed=seed, prune_every=every, prune_keep=keep)
    found = puzzler.search(PUZZLE, "pruned", 12, seed=seed, every=every, keep=keep)
    assert sequences(found) == sequences(generated)
    assert found.best_index == generated.best_index
    reasons = [candidate.finish_reason for candidate in found.candidates]
    assert reasons == [candidate.finish_reason for candidate in generated.candidates]
    assert [found.nodes[leaf].fate == "pruned" for leaf in found.leaves] == [r == "pruned" for r in reasons]


@pytest.mark.parametrize("method", ["beam", "lookahead", "dvts"])
def test_scores_of_a_search_by_steps_are_pytorchs(puzzler, rng, method):
    pytorch, _ = load_checkpoint(CHECKPOINT)
    options = {"steps": 1, "width": 2} if method == "lookahead" else {"width": 2}
    found = puzzler.search(PUZZLE, method, 8, seed=int(rng.integers(2**31)), **options)
    prompt = encode(PUZZLE)
    for candidate in found.candidates:
        with torch.no_grad():
            _, scores, logits = pytorch(torch.tensor([[*prompt, *candidate.tokens.tolist()]]))
        assert within(candidate.scores, scores[0, len(prompt) :, 0].sigmoid(), RUNTIME)
        steps = range(len(candidate.tokens))
        log_probs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)[steps, candidate.tokens.tolist()]
        assert within(candidate.log_probs, log_probs, RUNTIME)


def test_revisions_see_the_attempts_before_them(puzzler, rng):
    seed = int(rng.integers(2**31))
    found = puzzler.search(PUZZLE, "revisions", 7, seed=seed, chains=3, memory=1, max_new_tokens=19)
    assert len(found.candidates) == 6
    prompt = encode(PUZZLE)
    start = puzzler.generate(PUZZLE, n=3, seed=seed, max_new_tokens=19)
    attempts, contexts = sequences(found), []
    for number, first in enumerate(start.candidates):
        assert attempts[2 * number] == first.tokens.tolist()
        contexts.append([*prompt, *first.tokens.tolist()] + ([] if first.finish_reason == "stop" else [END]))
    for number, context in enumerate(contexts):
        # Chains that wrote the same attempt get different candidates of one context.
        following = puzzler.generate(context, n=contexts.count(context), seed=seed, max_new_tokens=19)
        its_draw = contexts[:number].count(context)
        assert attempts[2 * number + 1] == following.candidates[its_draw].tokens.tolist()
    assert found.cost.sampled_tokens == sum(len(candidate.tokens) for candidate in found.candidates)


@pytest.mark.parametrize("probe", [0, 5])
def test_revisions_of_what_was_written_before_draw_anew(tiny, monkeypatch, probe):
    drawn, generate = [], revisions._generate

    def recorded(tree, contexts, count, again):
        found = generate(tree, contexts, count, again)
        drawn.extend((context, again, row[0].tokens[0]) for context, row in zip(contexts, found, strict=True))
        return found

    monkeypatch.setattr(revisions, "_generate", recorded)
    model, options = bonnx.load(tiny), {"chains": 2, "memory": 1}
    # An attempt is one of two tokens: soon each has been in view before.
    sampling = {"max_new_tokens": 1, "top_k": 2, "seed": 2**63 - 1}
    if probe:
        policy = policy_for(model, [], {"40": [Choice("revisions", options)]}, probe)
        found = model.search([1, 2, 3], budget=40, policy=policy, **sampling)
        assert drawn[0][:2] == ((1, 2, 3), 1)
    else:
        found = model.search([1, 2, 3], "revisions", 40, **options, **sampling)
    assert len(found.candidates) == probe + 40
    assert len({(context, again) for context, again, _ in drawn}) == len(drawn)
    for context in {context for context, again, _ in drawn if again > 8}:
        assert len({token for other, _, token in drawn if other == context}) == 2


def test_the_exact_checker_as_a_scorer_finds_what_there_is(puzzler):
    puzzle = parse_prompt(PUZZLE)
    found = puzzler.search(PUZZLE, "best_of_n", 64, scorer=lambda ids: check(puzzle, decode(ids).split(":")[1]))
    assert (found.best.score == 1) == any(check(puzzle, c.text) for c in found.candidates)


def policy_for(model, thresholds, choices, probe=4):
    return Policy(1, model.manifest.name, model.manifest.seal, probe, thresholds, choices)


def test_a_policy_chooses_by_difficulty(puzzler, tmp_path, rng):
    seed = int(rng.integers(2**31))
    choices = [Choice("best_of_n", {}), Choice("beam", {"width": 2})]
    mean = np.mean([c.score for c in puzzler.generate(PUZZLE, n=4, seed=seed).candidates])
    easy, hard = (policy_for(puzzler, [float(mean) + shift], {"4": choices, "8": choices}) for shift in (-1e-3, 1e-3))
    easy.save(tmp_path / "policy.json")
    found = puzzler.search(PUZZLE, budget=11, policy=tmp_path / "policy.json", seed=seed)
    assert (found.method, found.policy["bin"], found.policy["budget"]) == ("best_of_n", 1, 8)
    assert sequences(found) == sequences(puzzler.generate(PUZZLE, n=8, seed=seed))
    found = puzzler.search(PUZZLE, budget=8, policy=hard, seed=seed)
    assert (found.method, found.policy["bin"]) == ("beam", 2)
    # What told how hard it is stays a candidate.
    assert sequences(found)[:4] == sequences(puzzler.generate(PUZZLE, n=4, seed=seed))
    assert len(found.candidates) == 4 + 8
    assert found.cost.prompt_tokens == len(encode(PUZZLE))


def test_a_policy_may_choose_by_certainty(puzzler):
    policy = policy_for(puzzler, [], {"8": [Choice("self_certainty", {})]})
    found = puzzler.search(PUZZLE, budget=8, policy=policy, seed=5)
    plain = puzzler.search(PUZZLE, "self_certainty", 8, seed=5)
    assert sequences(found) == sequences(plain)
    assert found.best_index == plain.best_index
    assert found.cost.prompt_tokens == plain.cost.prompt_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"artifact": "0" * 64}, "made for another artifact"),
        ({"schema_version": 2}, "this bonnx reads 1"),
        ({"thresholds": []}, "1 choices for each budget"),
    ],
    ids=["another artifact", "another version", "bins without choices"],
)
def test_a_policy_that_does_not_fit_the_model_is_refused(puzzler, change, message):
    good = policy_for(puzzler, [0.5], {"4": [Choice("best_of_n", {})] * 2})
    with pytest.raises(InputError, match=message):
        puzzler.search(PUZZLE, budget=4, policy=msgspec.structs.replace(good, **change))


def test_a_policy_sets_budget_and_method(puzzler, tmp_path):
    good = policy_for(puzzler, [0.5], {"4": [Choice("best_of_n", {})] * 2})
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(InputError, match="not a policy"):
        puzzler.search(PUZZLE, budget=4, policy=tmp_path / "p.json")
    with pytest.raises(InputError, match="budget: expected at least 4"):
        puzzler.search(PUZZLE, budget=3, policy=good)
    with pytest.raises(InputError, match="a policy sets the method"):
        puzzler.search(PUZZLE, budget=4, policy=good, width=2)


def test_fitting_takes_the_best_setting_of_each_bin(rng):
    easiness = rng.permutation(50) / 50.0
    table = {"a": (easiness > 0.5).astype(float), "b": (easiness <= 0.5).astype(float)}
    settings = {"a": Choice("best_of_n", {}), "b": Choice("beam", {"width": 2})}
    policy = fit_policy({4: table}, easiness, settings, name="x", artifact="y", probe=4, bins=2)
    assert [choice.method for choice in policy.choices["4"]] == ["best_of_n", "beam"]
    assert [policy.bin(value) for value in (0.9, 0.1, float("nan"))] == [0, 1, 1]
    assert policy.thresholds[0] == pytest.approx(0.49)


def test_a_result_is_json(countdown, puzzler):
    pieces = open_engine(countdown).reader.pieces
    found = puzzler.search(PUZZLE, "beam", 8, width=2, answers=lambda text: text.split(";")[0] or None)
    again = json.loads(json.dumps(found.to_record(PUZZLE, pieces), allow_nan=False))
    assert again["vote"] == "weighted"
    for candidate, ours in zip(again["candidates"], found.candidates, strict=True):
        assert "".join(candidate["pieces"]).rstrip("\n") == candidate["text"] == ours.text
    assert [node["parent"] for node in again["nodes"]] == [node.parent for node in found.nodes]


def test_without_a_tokenizer_answers_are_read_from_tokens(tiny):
    model = bonnx.load(tiny)
    found = model.search([1, 2, 3], "majority", 6, answers=lambda tokens: tokens[0], max_new_tokens=4)
    votes = [tokens[0] for tokens in sequences(found)]
    assert votes.count(sequences(found)[found.best_index][0]) == max(map(votes.count, votes))
    with pytest.raises(InputError, match="reads text"):
        model.search([1, 2, 3], "majority", 6, answers="number", max_new_tokens=4)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bonnx", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_searches(countdown, puzzler, tmp_path):
    done = command("generate", countdown, PUZZLE, "-n", 8, "--method", "beam", "--set", "width=2", "--json")
    assert done.returncode == 0, done.stderr
    expected = puzzler.search(PUZZLE, "beam", 8, width=2)
    assert json.loads(done.stdout)["best"] == expected.best.text
    run = tmp_path / "run"
    done = command("generate", countdown, PUZZLE, "-n", 8, "--method", "dvts", "--set", "width=sqrt", "--save", run)
    assert done.returncode == 0, done.stderr
    assert "dvts" in done.stderr + done.stdout
    (line,) = (run / "searches.jsonl").read_text().splitlines()
    assert json.loads(line)["method"] == "dvts"
    policy = policy_for(puzzler, [0.5], {"4": [Choice("best_of_n", {}), Choice("beam", {"width": 2})]})
    policy.save(tmp_path / "policy.json")
    done = command("generate", countdown, PUZZLE, "-n", 8, "--policy", tmp_path / "policy.json", "--json")
    assert json.loads(done.stdout)["policy"]["budget"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "bean"], "did you mean 'beam'"),
        (["--method", "beam", "--set", "width"], "--set: expected NAME=VALUE"),
        (["--set", "width=2"], "--set belongs to --method, --policy or --upstream"),
        (["--method", "beam", "--prune-every", "3"], "--method pruned"),
    ],
    ids=["unknown method", "setting without value", "setting without method", "option of generate"],
)
def test_the_command_refuses_invalid_searches(countdown, options, message):
    done = command("generate", countdown, PUZZLE, "-n", 8, *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_of_settings_within_a_point_the_cheapest_is_taken():
    table = {"dear": np.full(40, 0.905), "cheap": np.full(40, 0.9), "poor": np.full(40, 0.5)}
    tokens = {"dear": np.full(40, 9.0), "cheap": np.full(40, 2.0), "poor": np.full(40, 1.0)}
    place = np.arange(40) % 2
    assert set(cross_validated(table, place)[1]) == {"dear"}
    assert set(cross_validated(table, place, tokens=tokens)[1]) == {"cheap"}

"""`bonnx.load`, `rank` and `score`: answers against PyTorch, bad input refused, threads."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bonnx
from bonnx import InputError, NoWinnerError, ProviderError
from bonnx.models import load_checkpoint
from bonnx.models.countdown import CHECKPOINT
from bonnx.models.countdown.vocabulary import END, STEP, encode
from bonnx.runtime.artifact.manifest import Manifest, seal
from bonnx.runtime.engine import providers, session
from tests.tolerance import RUNTIME, within

PUZZLE = "3,7,12,25>98:"
CANDIDATES = ["12-3=9;9*7=63;63+25=88;", "25-12=13;13*7=91;91+3=94;", "12+3=15;", "25+7=32;32*3=96;96+12=98;"]


def embeddings(rng, length):
    return rng.standard_normal((length, 12)).astype(np.float32)


def test_rank_and_score_equal_pytorch(model, network, rng):
    prompt, candidates = embeddings(rng, 11), [embeddings(rng, n) for n in rng.integers(1, 20, 7)]
    ranking = model.rank(prompt, candidates)
    rows = [np.concatenate([prompt, c]) for c in candidates]
    with torch.no_grad():
        outputs = [network(torch.from_numpy(row)[None]) for row in rows]
    expected = [scores[0, 11:, 0].numpy() for _, scores in outputs]
    assert all(within(a, b, RUNTIME) for a, b in zip(ranking.scores, expected, strict=True))
    assert within(ranking.candidate_scores, [e[-1] for e in expected], RUNTIME)
    assert ranking.best_index == int(np.argmax([e[-1] for e in expected]))
    assert ranking.best is candidates[ranking.best_index]
    scored = model.score(rows, backbone=True, aggregation="min")
    for i, (backbone, scores) in enumerate(outputs):
        assert within(scored.scores[i], scores[0, :, 0], RUNTIME)
        assert within(scored.backbone[i], backbone[0], RUNTIME)
    assert within(scored.row_scores, [float(s.min()) for _, s in outputs], RUNTIME)


def test_text_is_ids_finished_with_the_end_token(countdown):
    model = bonnx.load(countdown)
    pytorch, _ = load_checkpoint(CHECKPOINT)
    ranking = model.rank(PUZZLE, CANDIDATES)
    for i, candidate in enumerate(CANDIDATES):
        ids = [*encode(PUZZLE), *encode(candidate), END]
        with torch.no_grad():
            scores = pytorch(torch.tensor([ids]))[1][0, len(encode(PUZZLE)) :, 0].sigmoid()
        assert within(ranking.scores[i], scores, RUNTIME)
    same = model.rank(encode(PUZZLE), [[*encode(c), END] for c in CANDIDATES])
    assert np.array_equal(same.candidate_scores, ranking.candidate_scores)
    finished = model.rank(PUZZLE, [c + "\n" for c in CANDIDATES])
    assert np.array_equal(finished.candidate_scores, ranking.candidate_scores)
    partial = model.rank(PUZZLE, CANDIDATES, partial=True)
    assert [len(s) + 1 for s in partial.scores] == [len(s) for s in ranking.scores]


def test_step_aggregations_read_the_ends_of_steps(countdown):
    model = bonnx.load(countdown)
    ranking = model.rank(PUZZLE, CANDIDATES, aggregation="step_min")
    for candidate, scores, found in zip(CANDIDATES, ranking.scores, ranking.candidate_scores, strict=True):
        ends = [i for i, token in enumerate(encode(candidate)) if token == STEP]
        assert within(found, scores[ends].min(), RUNTIME)


def test_a_right_solution_wins(countdown):
    assert (
        bonnx.load(countdown).rank("3,7,20,24>1:", ["24-20=4;4+3=7;7/7=1;", "24/3=8;20-7=13;13-8=1;"]).best_index == 0
    )


def test_step_masks_for_embeddings(model, rng):
    candidates = [embeddings(rng, 6), embeddings(rng, 4)]
    ranking = model.rank(embeddings(rng, 3), candidates, aggregation="step_mean", step_masks=[[0, 1, 0, 0, 1, 0], [1]])
    assert within(ranking.candidate_scores[0], ranking.scores[0][[1, 4]].mean(), RUNTIME)
    assert within(ranking.candidate_scores[1], ranking.scores[1][0], RUNTIME)
    with pytest.raises(InputError, match="needs step_masks"):
        model.rank(embeddings(rng, 3), candidates, aggregation="step_mean")
    with pytest.raises(InputError, match=r"step_masks\[0\]"):
        model.rank(embeddings(rng, 3), candidates, aggregation="step_mean", step_masks=[[2], [1]])


@pytest.mark.parametrize("verb", ["rank", "score"])
@pytest.mark.parametrize("vote", ["score", "weighted", "majority"])
def test_votes(model, rng, vote, verb):
    """The graphs against the scores that they themselves give, for candidates and for whole rows."""
    candidates, answers = [embeddings(rng, n) for n in rng.integers(1, 9, 12)], [*"abcabcabc", None, None, "d"]
    options = {"vote": vote, "answers": answers, "aggregation": "mean"}
    if verb == "rank":
        result = model.rank(embeddings(rng, 3), candidates, **options)
        scores = result.candidate_scores
    else:
        result = model.score(candidates, **options)
        scores = result.row_scores
    total = dict.fromkeys("abcd", 0.0)
    # Raw scores: the shares of those that vote.
    voters = [i for i in range(12) if answers[i]]
    weights = torch.from_numpy(scores[voters]).double().softmax(0)
    for i, weight in zip(voters, weights.tolist(), strict=True):
        total[answers[i]] += weight if vote == "weighted" else 1
    if vote == "score":
        best, second = sorted(scores, reverse=True)[:2]
        assert result.best_index == scores.argmax()
        assert result.group_scores is None
    else:
        best, second = sorted(total.values(), reverse=True)[:2]
        winner = max(total, key=total.get)
        assert result.best_index == max((i for i in range(12) if answers[i] == winner), key=lambda i: scores[i])
        assert within(result.group_scores[[0, 1, 2, 11]], [*total.values()], RUNTIME)
        assert np.isnan(result.group_scores[9:11]).all()
    assert within(result.margin, best - second, RUNTIME)
    assert result.order[0] == result.best_index
    assert sorted(result.order) == [*range(12)]
    assert result.answers == tuple(answers)


def test_probabilities_are_their_own_weights(countdown):
    model = bonnx.load(countdown)
    assert model.manifest.scoring.vote_weight == "score"
    texts = ["12+25=37;", "3*7=21;", "25-7=18;", "12-3=9;"]
    found = model.rank("3,7,12,25>98:", texts, vote="weighted", answers=[*"abba"], partial=True)
    scores = found.candidate_scores.astype(float)
    a, b = scores[[0, 3]].sum(), scores[[1, 2]].sum()
    assert within(found.group_scores, [a, b, b, a], RUNTIME)


def test_an_older_artifact_that_adds_up_raw_scores_takes_no_weighted_vote(edited, rng):
    manifest = json.loads((edited / "manifest.json").read_text())
    assert manifest["scoring"].pop("vote_weight") == "softmax"
    old = msgspec.json.decode(json.dumps(manifest), type=Manifest)
    (edited / "manifest.json").write_bytes(seal(old))
    model, rows = bonnx.load(edited), [embeddings(rng, 3) for _ in range(3)]
    for call in (lambda **vote: model.rank(rows[0], rows, **vote), lambda **vote: model.score(rows, **vote)):
        with pytest.raises(InputError, match=r"add up raw scores.* export the model again, or vote by 'score'"):
            call(vote="weighted", answers=[*"aab"])
        assert call(vote="majority", answers=[*"aab"]).best_index in (0, 1)


def test_a_fake_models_scores_are_weights():
    fake = bonnx.FakeModel(lambda prompt, candidate: float(candidate))
    assert fake.rank("", ["0.4", "0.5", "0.3"], vote="weighted", answers=[*"aba"]).best_index == 0
    with pytest.raises(InputError, match=r"the score of candidates\[1\]: .* expected 0 or more, got -0.5"):
        fake.rank("", ["0.4", "-0.5", "0.3"], vote="weighted", answers=[*"aba"])
    # Who has no vote has no weight.
    assert fake.rank("", ["0.4", "-0.5", "0.3"], vote="weighted", answers=["a", None, "a"]).best_index == 0


def test_majority_of_the_same_text(countdown):
    model = bonnx.load(countdown)
    candidates = model.generate("3,7,20,24>1:", n=16, seed=0).candidates
    texts = [candidate.text for candidate in candidates]
    ranking = model.rank("3,7,20,24>1:", [c.tokens for c in candidates], vote="majority", answers=texts)
    counts = [texts.count(text) for text in texts]
    assert ranking.group_scores.tolist() == counts
    assert texts[ranking.best_index] == texts[counts.index(max(counts))]


def test_bad_votes(model, countdown, rng):
    good = embeddings(rng, 3)
    cases = [
        ({"vote": "median"}, "vote: expected one of score, weighted, majority; got 'median'"),
        ({"vote": "majority"}, "vote='majority' needs answers"),
        ({"vote": "majority", "answers": ["a"]}, "answers: expected one for each of 2 candidates; got 1"),
        ({"vote": "weighted", "answers": ["a", []]}, r"answers\[1\]: expected something hashable or None; got list"),
        ({"vote": "weighted", "answers": "boxed"}, r"answers='boxed' reads text, and candidates\[0\] is none"),
        (
            {"answers": "box"},
            "answers: expected 'boxed', 'number', 'regex:PATTERN', 'tool' or 'tool-except:FIELD'; got 'box'",
        ),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            model.rank(good, [good, good], **options)
    with pytest.raises(InputError, match="answers: expected one for each of 1 rows; got 0"):
        model.score([good], vote="majority", answers=[])


# Few distinct values, so that ties are common.
BALLOTS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0, -1.0, math.nan]), st.sampled_from(["a", "b", 7, (1, 2), None])),
    min_size=1,
    max_size=8,
)


@given(BALLOTS, st.sampled_from(["score", "weighted", "majority"]))
def test_order_and_margin(ballots, vote):
    fake = bonnx.FakeModel(lambda prompt, candidate: candidate[0])
    scores, answers = zip(*ballots, strict=True)
    if all(map(math.isnan, scores)):
        with pytest.raises(NoWinnerError):
            fake.rank("", ballots, vote=vote, answers=answers)
        return
    if vote == "weighted" and any(score < 0 for score, answer in ballots if answer is not None):
        with pytest.raises(InputError, match="expected 0 or more, got -1"):
            fake.rank("", ballots, vote=vote, answers=answers)
        return
    found = fake.rank("", ballots, vote=vote, answers=lambda candidate: candidate[1])
    usable = [i for i in range(len(ballots)) if not math.isnan(scores[i])]
    voters = [i for i in usable if answers[i] is not None and vote != "score"]
    # Who stands together, in the order of the first.
    groups = [[i for i in voters if answers[i] == answer] for answer in dict.fromkeys(answers[i] for i in voters)]
    groups = groups or [[i] for i in usable]
    size = {"score": max, "weighted": sum, "majority": len if voters else max}[vote]
    totals = [size([scores[i] for i in group]) for group in groups]
    ranked = sorted(range(len(groups)), key=lambda g: -totals[g])
    order = [i for g in ranked for i in sorted(groups[g], key=lambda i: -scores[i])]
    order += sorted({*usable} - {*order}, key=lambda i: (-scores[i], i))
    order += [i for i in range(len(ballots)) if math.isnan(scores[i])]
    assert found.order == tuple(order)
    assert found.best_index == order[0]
    assert found.margin == (totals[ranked[0]] - totals[ranked[1]] if len(groups) > 1 else None)


def test_bad_embeddings(model, rng):
    good = embeddings(rng, 3)
    cases = [
        (good, [], "at least one candidate"),
        (good, [good[:0]], r"candidates\[0\]: it has no tokens"),
        (good, [[], good[:0]], r"candidates: none can be read: candidates\[0\]: it has no tokens"),
        (good[:0], [good], "prompt: it has no tokens"),
        (good[:, :5], [good], r"prompt: expected embeddings of shape \(length, 12\); got \(3, 5\)"),
        (good, [good.astype(np.float64)], r"candidates\[0\]: expected float32 embeddings; got float64"),
        ("text", [good], "this artifact has no tokenizer; pass embeddings"),
        (good, [good] * 31, "31 candidates: this artifact takes at most 30"),
        (embeddings(rng, 38), [good], "a prompt of 38 tokens and a candidate of 3: this artifact takes at most 40"),
    ]
    for prompt, candidates, message in cases:
        with pytest.raises(InputError, match=message):
            model.rank(prompt, candidates)
    with pytest.raises(InputError, match="aggregation: expected one of last, mean"):
        model.rank(good, [good], aggregation="median")


def test_bad_text_and_ids(countdown):
    model = bonnx.load(countdown)
    cases = [
        (PUZZLE, "12-3=9;", "expected a list of at least one candidate"),
        (PUZZLE, ["", "12^3"], r"candidates\[1\]: the vocabulary has no token for '\^' \(at character 2\)"),
        ("1000>3:", ["1"], "prompt: the vocabulary has no token for '1000'"),
        (PUZZLE, [""], r"candidates\[0\]: it has no tokens"),
        (PUZZLE, [[1012]], r"token id 1012 is outside the vocabulary \(0 to 1011\)"),
        (PUZZLE, [[-1]], "token id -1 is outside"),
        (PUZZLE, [[0.5]], "expected text or a 1-D list of token ids"),
        ("1," * 40 + "1>3:", ["1"], "takes at most 64 together"),
    ]
    for prompt, candidates, message in cases:
        with pytest.raises(InputError, match=message):
            model.rank(prompt, candidates)


def test_nan_never_wins(model, rng):
    prompt, good = embeddings(rng, 3), embeddings(rng, 3)
    bad = np.full((3, 12), np.nan, np.float32)
    ranking = model.rank(prompt, [bad, good])
    assert ranking.best_index == 1
    assert np.isnan(ranking.candidate_scores[0])
    with pytest.raises(NoWinnerError, match="every score is NaN"):
        model.rank(prompt, [bad, bad])


def test_equal_candidates_score_equally(model, rng):
    """To the last bits: a matrix product may round its rows differently. Exact ties are in test_selection.py."""
    prompt, good = embeddings(rng, 3), embeddings(rng, 5)
    found = model.rank(prompt, [good, good, good]).candidate_scores
    assert within(found, [found[0]] * 3, RUNTIME)


def test_many_threads_get_their_own_answers(model, rng):
    work = [(embeddings(rng, 5), [embeddings(rng, n) for n in rng.integers(1, 9, 4)]) for _ in range(40)]
    alone = [model.rank(*item).candidate_scores for item in work]
    barrier = threading.Barrier(8)

    def run(item):
        if item < 8:
            barrier.wait()
        return model.rank(*work[item]).candidate_scores

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, range(len(work))))
    assert all(within(a, b, RUNTIME) for a, b in zip(together, alone, strict=True))


def test_a_call_beyond_the_memory_limit_is_refused(small, rng):
    prompt, candidates = embeddings(rng, 5), [embeddings(rng, 5)]
    with pytest.raises(InputError, match="memory_limit=1000"):
        bonnx.load(small, memory_limit=1000).rank(prompt, candidates)
    assert bonnx.load(small, threads=1, memory_limit=10**8, provider="cpu").rank(prompt, candidates).best_index == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads: expected a whole number of at least 1; got 0"),
        ({"threads": 2**31}, r"threads: expected a whole number of at least 1 and below 2\^31; got 2147483648"),
        ({"device_id": -1}, "device_id: expected a whole number of at least 0; got -1"),
        ({"device_id": None}, "device_id: expected a whole number of at least 0; got None"),
        ({"provider": "gpu"}, "provider: expected 'auto', 'cpu' or 'cuda'; got 'gpu'"),
    ],
)
def test_invalid_options_of_load_are_refused(small, options, message):
    with pytest.raises(InputError, match=message):
        bonnx.load(small, **options)


def test_cuda_that_is_not_there_is_an_error(small, monkeypatch):
    monkeypatch.setattr(session, "_has_device", lambda: False)
    with pytest.raises(ProviderError, match=r"provider='cuda' was requested, but .*install `bonnx\[gpu\]`"):
        bonnx.load(small, provider="cuda")
    assert bonnx.load(small, provider="auto").provider == "cpu"


def test_both_flavours_installed(small, monkeypatch):
    monkeypatch.setattr(providers, "installed_flavours", lambda: {"onnxruntime": "1", "onnxruntime-gpu": "1"})
    with pytest.raises(ProviderError, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
        bonnx.load(small)


def test_fake_model_follows_the_rules():
    fake = bonnx.FakeModel(lambda prompt, candidate: [float(x) for x in candidate], aggregation="min")
    ranking = fake.rank([0], [[3, 1], [2, 2], [2, 5, 2]])
    assert (ranking.best_index, ranking.candidate_scores.tolist()) == (1, [1.0, 2.0, 2.0])
    assert fake.rank([0], [[3, 1], [2, 2]], aggregation="max").best_index == 0
    assert fake.rank([0], [[9, 1], [2, 2]], aggregation="step_last", step_masks=[[1, 0], [0, 1]]).best_index == 0
    with pytest.raises(InputError, match="at least one candidate"):
        fake.rank([0], [])
    with pytest.raises(NoWinnerError):
        bonnx.FakeModel(lambda prompt, candidate: float("nan")).rank("", ["a"])

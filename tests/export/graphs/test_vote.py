"""The vote subgraph against NumPy and against the rules, on ONNX Runtime and on ONNX's reference evaluator."""

import math
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from bonnx.export.graphs.builder import Builder, finish, name_value
from bonnx.export.graphs.selection import FUNCTIONS
from bonnx.export.graphs.vote import elect, share
from bonnx.runtime.artifact.manifest import VOTES
from bonnx.runtime.selection.aggregate import best_of_n
from bonnx.runtime.selection.aggregate import elect as elect_in_numpy


def vote_model(opset, vote_weight):
    given = [
        ir.val("candidate_scores", ir.DataType.FLOAT, ["num_candidates", "batch"]),
        ir.val("answer_ids", ir.DataType.INT64, ["answer_candidates", "answer_batch"]),
        ir.val("vote", ir.DataType.INT64, []),
    ]
    builder = Builder("vote")
    scores, ids, vote = given
    weights = scores if vote_weight == "score" else builder.call(share, scores, ids)
    best, groups = builder.call(elect, scores, weights, ids, vote)
    name_value(best, "best_index", ir.DataType.INT64, ["batch"])
    name_value(groups, "group_scores", ir.DataType.FLOAT, ["num_candidates", "batch"])
    graph = ir.Graph(given, [best, groups], nodes=[], name="vote")
    builder.extend(graph)
    model = ir.to_proto(finish(graph, FUNCTIONS, opset))
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    return model


def session(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


MODELS = [vote_model(opset, "score") for opset in (18, 23)]
ENGINES = [make(model) for make in (session, ReferenceEvaluator) for model in MODELS]
RAW = [make(vote_model(opset, "softmax")) for make in (session, ReferenceEvaluator) for opset in (18, 23)]


def run(engine, scores, ids, vote):
    feeds = {"candidate_scores": scores, "answer_ids": ids, "vote": np.array(VOTES.index(vote))}
    with np.errstate(invalid="ignore"):
        return engine.run(["best_index", "group_scores"], feeds)


def expected(scores, ids, vote, weights=None):
    """Written from the rules for one prompt, in plain Python: winner and group scores."""
    weights = scores if weights is None else weights
    usable = [i for i, score in enumerate(scores) if not math.isnan(score)]
    voters = [i for i in usable if ids[i] >= 0 and vote != "score"]
    if not voters:
        return max(usable, key=lambda i: (scores[i], -i), default=-1), list(scores)
    totals = Counter()
    for i in voters:
        totals[ids[i]] += weights[i] if vote == "weighted" else 1
    groups = [totals[ids[i]] if i in voters else math.nan for i in range(len(scores))]
    standing = [answer for answer in dict.fromkeys(ids[i] for i in voters) if not math.isnan(totals[answer])]
    if not standing:
        return -1, groups
    # `max` takes the first of equals: the answer that comes first.
    answer = max(standing, key=lambda answer: totals[answer])
    return max((i for i in voters if ids[i] == answer), key=lambda i: (scores[i], -i)), groups


# Few distinct values, so that ties are common; quarters and halves, so that sums are exact.
FINITE = [0.0, -0.0, 0.25, 0.5, 1.0, -1.0, 2.0]
ODD = [*FINITE, math.nan, math.inf, -math.inf]
RAW_SCORES = [-300.0, -5.5, -1.0, -0.0, 0.0, 0.25, 3.0, 300.0, math.nan, math.inf, -math.inf]
IDS = [-(2**63), -1, 0, 1, 2**31, 2**62, 2**63 - 1]


def draw_ballot(data, values):
    """Scores and answer ids (count, batch), the answers few enough to be shared."""
    count, batch = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    answers = st.sampled_from(data.draw(st.lists(st.sampled_from(IDS), min_size=1, max_size=4)))
    size = {"min_size": count * batch, "max_size": count * batch}
    scores = np.array(data.draw(st.lists(st.sampled_from(values), **size)), np.float32).reshape(count, batch)
    return scores, np.array(data.draw(st.lists(answers, **size)), np.int64).reshape(count, batch)


@settings(max_examples=400)
@given(data=st.data(), engine=st.sampled_from(ENGINES), vote=st.sampled_from(VOTES))
def test_votes_follow_the_rules(data, engine, vote):
    scores, ids = draw_ballot(data, FINITE if data.draw(st.booleans()) else ODD)
    batch = scores.shape[1]
    best, groups = run(engine, scores, ids, vote)
    for b in range(batch):
        wanted, wanted_groups = expected(scores[:, b].tolist(), ids[:, b].tolist(), vote)
        assert best[b] == wanted
        np.testing.assert_array_equal(groups[:, b], np.array(wanted_groups, np.float32))
    with np.errstate(invalid="ignore"):
        for elected, twin in zip((best, groups), elect_in_numpy(scores, ids, vote), strict=True):
            np.testing.assert_array_equal(elected, twin)


def softmax(scores):
    """PyTorch's in float64; where it gives NaN, those that are infinite share everything."""
    top = max(scores, default=0.0)
    shares = [float(score == top) for score in scores]
    if math.isfinite(top):
        return torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    return [one / sum(shares) for one in shares]


@settings(max_examples=200)
@given(data=st.data(), engine=st.sampled_from(RAW), vote=st.sampled_from(VOTES))
def test_votes_of_raw_scores_follow_the_rules(data, engine, vote):
    scores, ids = draw_ballot(data, RAW_SCORES)
    count, batch = scores.shape
    best, groups = run(engine, scores, ids, vote)
    for b in range(batch):
        column, own = scores[:, b].tolist(), ids[:, b].tolist()
        voters = [i for i in range(count) if own[i] >= 0 and not math.isnan(column[i])]
        weights = dict(zip(voters, softmax([column[i] for i in voters]), strict=True))
        wanted, wanted_groups = expected(column, own, vote, weights)
        np.testing.assert_allclose(groups[:, b], wanted_groups, rtol=1e-5, atol=1e-30)
        if vote == "weighted" and voters:
            totals = {own[i]: float(groups[i, b]) for i in voters}
            assert min(totals.values()) >= 0
            assert math.isclose(sum(totals.values()), 1, rel_tol=1e-5)
            # Sums that are equal but for rounding: the graph's own say which is more.
            answer = max(totals, key=lambda answer: totals[answer])
            wanted = max((i for i in voters if own[i] == answer), key=lambda i: (column[i], -i))
        assert best[b] == wanted
    with np.errstate(invalid="ignore"):
        _, twin_groups = elect_in_numpy(scores, ids, vote, "softmax")
    np.testing.assert_allclose(groups, twin_groups, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("engine", RAW)
def test_raw_scores_below_0_do_not_turn_a_vote_upside_down(engine, rng):
    # Answer 7 has the most votes and the best candidate; a sum of scores would choose 5.
    scores, ids = np.array([[-1.0], [-1.5], [-2.0], [-2.5]], np.float32), np.array([[7], [7], [7], [5]])
    assert run(engine, scores, ids, "weighted")[0].tolist() == [0]
    assert scores[:3].sum() < scores[3]
    # A number added to all scores changes nothing, whatever it is.
    scores = rng.standard_normal((9, 4)).astype(np.float32)
    ids = rng.integers(-1, 3, (9, 4))
    best, groups = run(engine, scores, ids, "weighted")
    for shift in (-1000.0, -3.0, 50.0):
        moved, same = run(engine, scores + np.float32(shift), ids, "weighted")
        np.testing.assert_array_equal(moved, best)
        np.testing.assert_allclose(same[ids >= 0], groups[ids >= 0], rtol=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_ids_may_be_one_number_for_all(engine, rng):
    scores = rng.standard_normal((6, 2)).astype(np.float32)
    best, groups = run(engine, scores, np.array([[-1]]), "score")
    assert best.tolist() == scores.argmax(0).tolist()
    np.testing.assert_array_equal(groups, scores)
    best, groups = run(engine, scores, np.array([[3]]), "weighted")
    assert best.tolist() == scores.argmax(0).tolist()
    np.testing.assert_allclose(groups, np.broadcast_to(scores.sum(0), (6, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vote", VOTES)
def test_many_candidates_in_any_order(vote, rng):
    """Scores of a few sizes are added exactly, so a permutation changes no digit of a sum."""
    scores = rng.uniform(0, 1, (4096, 1)).astype(np.float32)
    ids = rng.integers(-(2**62), 2**62, 300)[rng.integers(0, 300, (4096, 1))]
    best, groups = run(ENGINES[0], scores, ids, vote)
    wanted, wanted_groups = elect_in_numpy(scores, ids, vote)
    np.testing.assert_array_equal(best, wanted)
    np.testing.assert_array_equal(groups, wanted_groups)
    order = rng.permutation(4096)
    again, moved = run(ENGINES[0], scores[order], ids[order], vote)
    np.testing.assert_array_equal(moved, groups[order])
    # Of equal answers the first wins, which another order makes another one.
    assert groups[order[again[0]]] == groups[best[0]] == np.nanmax(groups)


def test_a_weighted_vote_is_neither_the_best_score_nor_the_majority():
    scores, ids = np.array([[0.9], [0.3], [0.3], [0.2], [0.5], [0.6]], np.float32), np.array([[7, 5, 5, 5, 2, 2]]).T
    assert [int(run(ENGINES[0], scores, ids, vote)[0][0]) for vote in VOTES] == [0, 5, 1]
    assert best_of_n(scores).tolist() == [0]

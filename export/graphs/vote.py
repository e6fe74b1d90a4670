"""Who wins, as ONNX subgraphs: the best of the candidates' scores, or the best of the answer that wins a vote.

Weighted: the answer whose candidates' weights sum to most (Li et al., 2023; best-of-N weighted of Snell et al., 2024).
Majority: the answer of most candidates (self-consistency, Wang et al., 2023). Its best candidate wins.

A probability is its own weight. A raw score is not: below 0 a vote for an answer would count against it, and a number
added to all scores, which changes nothing for a reward model of comparisons (Bradley and Terry, 1952), would change the
winner. Its weight is its share in the softmax: in that model, the probability that the candidate is the best of them.

Rules: a candidate whose score is NaN does not count and never wins; one without an answer has no vote and can win only
if no candidate that counts has an answer, and then the best score wins; ties between answers go to the one that comes
first, ties between candidates to the lowest index; when nothing can win, `best_index` is -1.
"""

from __future__ import annotations

from typing import Any

import msgspec
from onnxscript import opset18, script
from onnxscript.values import Opset

from bonnx.runtime.artifact.manifest import Scoring

from .builder import DOMAIN

__all__ = ["best_of_n", "elect", "share", "with_vote_weight"]

# The operators' type variables are too narrow for values that onnxscript infers.
op: Any = opset18
this: Any = Opset(DOMAIN, 1)


@script(this, default_opset=opset18)
def best_of_n(candidate_scores):  # type: ignore[no-untyped-def]
    """The index of the maximum: (N, B) float32 -> (B) int64."""
    low = op.Constant(value_float=float("-inf"))
    axis = op.Constant(value_ints=[0])
    usable = op.Not(op.IsNaN(candidate_scores))
    ranked = op.Where(usable, candidate_scores, low)
    best = op.Equal(ranked, op.ReduceMax(ranked, axis, keepdims=1))
    # Usable first, then value: a score of -inf is one and beats NaN.
    winners = op.Cast(op.And(usable, best), to=1)
    first = op.ArgMax(winners, axis=0, keepdims=0)
    any_winner = op.Greater(op.ReduceMax(winners, axis, keepdims=0), op.Constant(value_float=0.0))
    return op.Where(any_winner, first, op.Constant(value_int=-1))


def with_vote_weight(scoring: Scoring) -> Scoring:
    """The scoring rule with the vote weights that suit its activation."""
    return msgspec.structs.replace(scoring, vote_weight="softmax" if scoring.activation == "none" else "score")


@script(this, default_opset=opset18)
def share(candidate_scores, answer_ids):  # type: ignore[no-untyped-def]
    """The softmax over the candidates that may vote: scores (N, B) float32, ids as in `elect` -> (N, B) float32.

    Others have the weight 0; NaN where nobody may vote.
    """
    zero = op.Constant(value_float=0.0)
    low = op.Constant(value_float=float("-inf"))
    axis = op.Constant(value_ints=[0])
    ids = op.Expand(answer_ids, op.Shape(candidate_scores))
    voter = op.And(op.Not(op.IsNaN(candidate_scores)), op.GreaterOrEqual(ids, op.Constant(value_int=0)))
    ranked = op.Where(voter, candidate_scores, low)
    best = op.ReduceMax(ranked, axis, keepdims=1)
    # Infinity less infinity would be NaN.
    behind = op.Where(op.Equal(ranked, best), zero, op.Sub(ranked, best))
    weight = op.Exp(op.Cast(op.Where(voter, behind, low), to=11))
    return op.Cast(op.Div(weight, op.ReduceSum(weight, axis, keepdims=1)), to=1)


@script(this, default_opset=opset18)
def elect(candidate_scores, weights, answer_ids, vote):  # type: ignore[no-untyped-def]
    """The vote.

    Args:
        candidate_scores: (N, B) float32.
        weights: (N, B) float32, what each adds to its answer in a weighted vote.
        answer_ids: broadcastable to (N, B), int64, equal for equal answers; below 0 where no answer was found.
        vote: int64 scalar, an index into `VOTES`: 0 score (without any vote), 1 weighted, 2 majority.

    Returns:
        best_index (B) int64 and group_scores (N, B) float32: each candidate's answer's sum of weights or count, NaN for
        one that cannot win; where there is no vote, each candidate's own score.
    """
    nan = op.Constant(value_float=float("nan"))
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    axis = op.Constant(value_ints=[0])
    zero_index = op.Constant(value_int=0)
    shape = op.Shape(candidate_scores)

    ids = op.Expand(answer_ids, shape)
    usable = op.Not(op.IsNaN(candidate_scores))
    answered = op.And(op.And(usable, op.GreaterOrEqual(ids, zero_index)), op.Greater(vote, zero_index))
    voting = op.Greater(op.ReduceMax(op.Cast(answered, to=1), axis, keepdims=1), zero)
    group = op.Where(answered, ids, op.Constant(value_int=-1))
    # A row of a table for each id: time and memory grow as N, not as its square.
    different, _, row, _ = op.Unique(group)
    row = op.Reshape(row, shape)
    weight = op.Where(op.Equal(vote, op.Constant(value_int=2)), one, weights)
    # In double precision such a sum is exact but for scores of very different size: the order does not matter.
    weight = op.Cast(op.Where(answered, weight, zero), to=11)
    blank = op.Expand(op.Cast(zero, to=11), op.Concat(op.Shape(different), op.Shape(candidate_scores, start=1), axis=0))
    sums = op.GatherElements(op.ScatterElements(blank, row, weight, axis=0, reduction="add"), row, axis=0)
    group_scores = op.Where(voting, op.Where(answered, op.Cast(sums, to=1), nan), candidate_scores)

    # The first of the best answer's candidates, then the best of them.
    first = op.Unsqueeze(op.Max(best_of_n(group_scores), zero_index), axis)
    chosen = op.Or(op.Not(voting), op.Equal(group, op.GatherElements(group, first, axis=0)))
    # The sum of a group may be NaN, from opposite infinities: then it cannot win.
    member = op.And(chosen, op.Not(op.IsNaN(group_scores)))
    best_index = best_of_n(op.Where(member, candidate_scores, nan))
    return best_index, group_scores

"""Selection of the winner, as ONNX subgraphs: the best score, or the best candidate of the answer that wins a vote.

Weighted: the answer whose candidates have the largest sum of weights wins (Li et al., 2023; best-of-N weighted in Snell
et al., 2024). Majority: the most frequent answer wins (self-consistency, Wang et al., 2023). Either way, the best
candidate with that answer is selected.

A probability is used as a weight as it is. A raw score cannot be: a negative one would count against its own answer,
and adding a constant to all scores, which means nothing to a reward model trained on comparisons (Bradley and Terry,
1952), could change the winner. Its weight is its softmax over the candidates: under that model, the probability that
the candidate is the best.

A candidate whose score is NaN never votes and never wins. One without an answer never votes, and can win only if no
valid candidate has an answer; then the best score wins. Ties between answers go to the one that comes first, ties
between candidates to the lowest index. If nothing can win, `best_index` is -1.
"""

from __future__ import annotations

from typing import Any

import msgspec
from onnxscript import opset18, script
from onnxscript.values import Opset

from bonnx.runtime.artifact.manifest import Scoring

from .builder import DOMAIN

__all__ = ["answer_rows", "best_of_n", "elect", "share", "with_vote_weight"]

# Any, because the operators' type variables are too narrow for the values that onnxscript infers.
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
    # A score of -inf is valid and beats NaN, hence both conditions.
    winners = op.Cast(op.And(usable, best), to=1)
    first = op.ArgMax(winners, axis=0, keepdims=0)
    any_winner = op.Greater(op.ReduceMax(winners, axis, keepdims=0), op.Constant(value_float=0.0))
    return op.Where(any_winner, first, op.Constant(value_int=-1))


def with_vote_weight(scoring: Scoring) -> Scoring:
    """Return the scoring rule with the vote weights that suit its activation."""
    return msgspec.structs.replace(scoring, vote_weight="softmax" if scoring.activation == "none" else "score")


@script(this, default_opset=opset18)
def share(candidate_scores, answer_ids):  # type: ignore[no-untyped-def]
    """The softmax over the candidates that vote: scores (N, B) float32, ids as in `elect` -> (N, B) float32.

    Other candidates have weight 0; if none votes, all are NaN.
    """
    zero = op.Constant(value_float=0.0)
    low = op.Constant(value_float=float("-inf"))
    axis = op.Constant(value_ints=[0])
    ids = op.Expand(answer_ids, op.Shape(candidate_scores))
    voter = op.And(op.Not(op.IsNaN(candidate_scores)), op.GreaterOrEqual(ids, op.Constant(value_int=0)))
    ranked = op.Where(voter, candidate_scores, low)
    best = op.ReduceMax(ranked, axis, keepdims=1)
    # Infinity minus infinity would be NaN.
    behind = op.Where(op.Equal(ranked, best), zero, op.Sub(ranked, best))
    weight = op.Exp(op.Cast(op.Where(voter, behind, low), to=11))
    return op.Cast(op.Div(weight, op.ReduceSum(weight, axis, keepdims=1)), to=1)


@script(this, default_opset=opset18)
def answer_rows(group):  # type: ignore[no-untyped-def]
    """Number each prompt's answers from 0 on: ids (N, B) int64 -> (N, B) int64, equal where the ids are equal.

    By sorting, because ONNX Runtime has `Unique` on the CPU only.
    """
    axis = op.Constant(value_ints=[0])
    by_size, order = op.TopK(group, op.Shape(group, start=0, end=1), axis=0)
    # Each entry beside the one before it; the first beside itself.
    first = op.Slice(by_size, axis, op.Constant(value_ints=[1]), axis)
    before = op.Concat(first, op.Slice(by_size, axis, op.Constant(value_ints=[-1]), axis), axis=0)
    number = op.CumSum(op.Cast(op.Not(op.Equal(by_size, before)), to=7), op.Constant(value_int=0))
    return op.ScatterElements(order, order, number, axis=0)


@script(this, default_opset=opset18)
def elect(candidate_scores, weights, answer_ids, vote):  # type: ignore[no-untyped-def]
    """Select the winner by score or by vote.

    Args:
        candidate_scores: (N, B) float32.
        weights: (N, B) float32, each candidate's weight in a weighted vote.
        answer_ids: broadcastable to (N, B), int64, equal for equal answers; negative if there is no answer.
        vote: int64 scalar, an index into `VOTES`: 0 score (no vote), 1 weighted, 2 majority.

    Returns:
        best_index (B) int64 and group_scores (N, B) float32: the sum of weights, or the count, of each candidate's
        answer; NaN for a candidate that cannot win. Without a vote, each candidate's own score.
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
    row = answer_rows(group)
    weight = op.Where(op.Equal(vote, op.Constant(value_int=2)), one, weights)
    # In double precision the sum is exact unless the scores' magnitudes differ widely, so the order does not matter.
    weight = op.Cast(op.Where(answered, weight, zero), to=11)
    # A table with a row for each answer, so that time and memory hardly grow faster than N.
    blank = op.Expand(op.Cast(zero, to=11), shape)
    sums = op.GatherElements(op.ScatterElements(blank, row, weight, axis=0, reduction="add"), row, axis=0)
    group_scores = op.Where(voting, op.Where(answered, op.Cast(sums, to=1), nan), candidate_scores)

    # The first candidate with the winning answer identifies it; then the best candidate with that answer is selected.
    first = op.Unsqueeze(op.Max(best_of_n(group_scores), zero_index), axis)
    chosen = op.Or(op.Not(voting), op.Equal(group, op.GatherElements(group, first, axis=0)))
    # Opposite infinities make a group's sum NaN; then the group cannot win.
    member = op.And(chosen, op.Not(op.IsNaN(group_scores)))
    best_index = best_of_n(op.Where(member, candidate_scores, nan))
    return best_index, group_scores

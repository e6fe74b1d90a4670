"""Best-of-N as an ONNX subgraph, part of every graph that scores: mask, aggregate, and select as in `vote.py`.

Padding never counts. A candidate without tokens never wins, and its score is NaN.

The aggregation is chosen at run time: `aggregation` is an index into `AGGREGATIONS`, and `step_mask` restricts it to
the positions where a step ends (Lightman et al., 2023, and Snell et al., 2024, compare the variants); a single 1
selects every position. If no step ends in a candidate, its last token counts. All are plain inputs without defaults,
because ONNX Runtime's JavaScript API cannot override an initializer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import opset18, script

from .builder import Builder, name_value
from .vote import answer_rows, best_of_n, elect, share

__all__ = ["FUNCTIONS", "aggregate", "append_selection", "plain_selection"]

# Any, because the operators' type variables are too narrow for the values that onnxscript infers.
op: Any = opset18


@script(default_opset=opset18)
def aggregate(scores, mask, step_mask, aggregation):  # type: ignore[no-untyped-def]
    """Reduce each candidate's scores to one.

    Args:
        scores: (N, B, T) float32.
        mask: (N, B, T) int64, above 0 where a token is real.
        step_mask: broadcastable to (N, B, T), int64, above 0 where a step ends.
        aggregation: broadcastable to (N, B, 1), int64.

    Returns:
        candidate_scores (N, B) float32.
    """
    nan = op.Constant(value_float=float("nan"))
    low = op.Constant(value_float=float("-inf"))
    high = op.Constant(value_float=float("inf"))
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    # Not -1: for an axis of size 0, ONNX Runtime before 1.32 then keeps the axis.
    last_axis = op.Constant(value_ints=[2])
    zero_index = op.Constant(value_int=0)

    real = op.Greater(mask, zero_index)
    ends = op.And(real, op.Greater(step_mask, zero_index))
    # Positions 1..T, and 0 where nothing is read, so that the maximum is the last position.
    places = op.CumSum(op.Cast(op.Or(real, op.Not(real)), to=1), op.Constant(value_int=2))
    last_token = op.ReduceMax(op.Where(real, places, zero), last_axis, keepdims=1)
    last_end = op.ReduceMax(op.Where(ends, places, zero), last_axis, keepdims=1)
    has_ends = op.Greater(last_end, zero)
    last_place = op.Where(has_ends, last_end, last_token)
    is_last = op.And(real, op.Equal(places, last_place))
    several = op.And(has_ends, op.Not(op.Equal(aggregation, zero_index)))
    # ONNX Runtime lacks Where on booleans.
    read = op.Or(op.And(several, ends), op.And(op.Not(several), is_last))

    count = op.ReduceSum(op.Cast(read, to=1), last_axis, keepdims=1)
    mean = op.Div(op.ReduceSum(op.Where(read, scores, zero), last_axis, keepdims=1), count)
    smallest = op.ReduceMin(op.Where(read, scores, high), last_axis, keepdims=1)
    largest = op.ReduceMax(op.Where(read, scores, low), last_axis, keepdims=1)
    product = op.ReduceProd(op.Where(read, scores, one), last_axis, keepdims=1)
    value = op.Where(op.Equal(aggregation, op.Constant(value_int=2)), smallest, mean)
    value = op.Where(op.Equal(aggregation, op.Constant(value_int=3)), largest, value)
    value = op.Where(op.Equal(aggregation, op.Constant(value_int=4)), product, value)
    spoiled = op.Cast(op.And(read, op.IsNaN(scores)), to=1)
    invalid = op.Or(op.Greater(op.ReduceMax(spoiled, last_axis, keepdims=1), zero), op.Not(op.Greater(count, zero)))
    return op.Squeeze(op.Where(invalid, nan, value), last_axis)


FUNCTIONS = (aggregate, best_of_n, share, answer_rows, elect)


def append_selection(
    graph: ir.Graph, builder: Builder, scores: ir.Value, mask: ir.Value, vote_weight: str = "score"
) -> None:
    """Append aggregation and vote to a graph in place.

    Args:
        graph: receives the inputs `step_mask`, `aggregation`, `answer_ids` and `vote`, and the outputs
            `candidate_scores`, `best_index` and `group_scores`.
        builder: collects the nodes to append; it may already hold some.
        scores: (N, B, T) float32.
        mask: (N, B, T) int64.
        vote_weight: as in `Scoring`.
    """
    step_mask = ir.val("step_mask", ir.DataType.INT64, ["step_candidates", "step_batch", "step_length"])
    answer_ids = ir.val("answer_ids", ir.DataType.INT64, ["answer_candidates", "answer_batch"])
    aggregation, vote = (ir.val(name, ir.DataType.INT64, []) for name in ("aggregation", "vote"))
    candidate_scores = builder.call(aggregate, scores, mask, step_mask, aggregation)
    weights = candidate_scores if vote_weight == "score" else builder.call(share, candidate_scores, answer_ids)
    best_index, group_scores = builder.call(elect, candidate_scores, weights, answer_ids, vote)
    name_value(candidate_scores, "candidate_scores", ir.DataType.FLOAT, ["num_candidates", "batch"])
    name_value(best_index, "best_index", ir.DataType.INT64, ["batch"])
    name_value(group_scores, "group_scores", ir.DataType.FLOAT, ["num_candidates", "batch"])
    graph.inputs.extend([step_mask, aggregation, answer_ids, vote])
    graph.outputs.extend([candidate_scores, best_index, group_scores])
    builder.extend(graph)


def plain_selection() -> dict[str, NDArray[np.int64]]:
    """Return the feeds for best-of-N by the last position's score: every position, `last`, no vote."""
    names = {"step_mask": np.ones((1, 1, 1), np.int64), "answer_ids": np.full((1, 1), -1)}
    return names | {"aggregation": np.array(0), "vote": np.array(0)}

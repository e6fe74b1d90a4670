"""Best-of-N as an ONNX subgraph: mask, aggregate, ArgMax over the candidates. Appended to every graph that scores.

Rules: padding never counts; ties go to the lowest index; a NaN never wins; a candidate with no tokens never wins and
its score is NaN; when nothing can win, `best_index` is -1.

The aggregation is chosen at run time: `aggregation` is an index into `AGGREGATIONS`, and `step_mask` limits it to
the positions where a step ends (Lightman et al., 2023, and Snell et al., 2024, compare the forms); a single 1 reads
every position. A candidate in which no step ends is read at its last token. Both are plain inputs: ONNX Runtime's
JavaScript cannot override an initial value.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset18, script

from .builder import Builder, name_value

__all__ = ["append_selection", "select"]

# The operators' type variables are too narrow for values that onnxscript infers.
op: Any = opset18


@script(default_opset=opset18)
def select(scores, mask, step_mask, aggregation):  # type: ignore[no-untyped-def]
    """The subgraph.

    Args:
        scores: (N, B, T) float32.
        mask: (N, B, T) int64, above 0 where a token is real.
        step_mask: broadcastable to (N, B, T), int64, above 0 where a step ends.
        aggregation: int64 scalar.

    Returns:
        candidate_scores (N, B) float32 and best_index (B) int64.
    """
    nan = op.Constant(value_float=float("nan"))
    low = op.Constant(value_float=float("-inf"))
    high = op.Constant(value_float=float("inf"))
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    # Not -1: over an axis of size 0, ONNX Runtime before 1.32 leaves that axis in place.
    last_axis = op.Constant(value_ints=[2])
    candidate_axis = op.Constant(value_ints=[0])
    zero_index = op.Constant(value_int=0)

    real = op.Greater(mask, zero_index)
    ends = op.And(real, op.Greater(step_mask, zero_index))
    # Positions 1..T, 0 where nothing is read: the greatest is the last.
    places = op.CumSum(op.Cast(op.Or(real, op.Not(real)), to=1), op.Constant(value_int=2))
    last_token = op.ReduceMax(op.Where(real, places, zero), last_axis, keepdims=1)
    last_end = op.ReduceMax(op.Where(ends, places, zero), last_axis, keepdims=1)
    has_ends = op.Greater(last_end, zero)
    last_place = op.Where(has_ends, last_end, last_token)
    is_last = op.And(real, op.Equal(places, last_place))
    several = op.And(has_ends, op.Not(op.Equal(aggregation, zero_index)))
    # Where on booleans is missing from ONNX Runtime.
    read = op.Or(op.And(several, ends), op.And(op.Not(several), is_last))

    count = op.ReduceSum(op.Cast(read, to=1), last_axis, keepdims=0)
    mean = op.Div(op.ReduceSum(op.Where(read, scores, zero), last_axis, keepdims=0), count)
    least = op.ReduceMin(op.Where(read, scores, high), last_axis, keepdims=0)
    greatest = op.ReduceMax(op.Where(read, scores, low), last_axis, keepdims=0)
    product = op.ReduceProd(op.Where(read, scores, one), last_axis, keepdims=0)
    value = op.Where(op.Equal(aggregation, op.Constant(value_int=2)), least, mean)
    value = op.Where(op.Equal(aggregation, op.Constant(value_int=3)), greatest, value)
    value = op.Where(op.Equal(aggregation, op.Constant(value_int=4)), product, value)
    spoiled = op.Cast(op.And(read, op.IsNaN(scores)), to=1)
    invalid = op.Or(op.Greater(op.ReduceMax(spoiled, last_axis, keepdims=0), zero), op.Not(op.Greater(count, zero)))
    candidate_scores = op.Where(invalid, nan, value)

    usable = op.Not(op.IsNaN(candidate_scores))
    ranked = op.Where(usable, candidate_scores, low)
    best = op.Equal(ranked, op.ReduceMax(ranked, candidate_axis, keepdims=1))
    # Usable first, then value: a score of -inf is one and beats NaN.
    winners = op.Cast(op.And(usable, best), to=1)
    first = op.ArgMax(winners, axis=0, keepdims=0)
    found = op.Greater(op.ReduceMax(winners, candidate_axis, keepdims=0), zero)
    best_index = op.Where(found, first, op.Constant(value_int=-1))
    return candidate_scores, best_index


def append_selection(graph: ir.Graph, builder: Builder, scores: ir.Value, mask: ir.Value) -> None:
    """Append `select` to a graph in place.

    Args:
        graph: it gets the inputs `aggregation` and `step_mask` and the outputs `candidate_scores` and `best_index`.
        builder: collects the nodes that are appended to the graph; it may hold some already.
        scores: (N, B, T) float32.
        mask: (N, B, T) int64.
    """
    step_mask = ir.val("step_mask", ir.DataType.INT64, ["step_candidates", "step_batch", "step_length"])
    aggregation = ir.val("aggregation", ir.DataType.INT64, [])
    candidate_scores, best_index = builder.call(select, scores, mask, step_mask, aggregation)
    name_value(candidate_scores, "candidate_scores", ir.DataType.FLOAT, ["num_candidates", "batch"])
    name_value(best_index, "best_index", ir.DataType.INT64, ["batch"])
    graph.inputs.extend([step_mask, aggregation])
    graph.outputs.extend([candidate_scores, best_index])
    builder.extend(graph)

"""The selection subgraph against NumPy, on ONNX Runtime and on ONNX's reference evaluator."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from bonnx import AGGREGATIONS
from bonnx.export.graphs.builder import Builder, finish
from bonnx.export.graphs.selection import FUNCTIONS, append_selection, plain_selection
from tests.tolerance import RUNTIME, within


def selection_model():
    shape = ["num_candidates", "batch", "length"]
    scores, mask = ir.val("scores", ir.DataType.FLOAT, shape), ir.val("mask", ir.DataType.INT64, shape)
    graph = ir.Graph([scores, mask], [], nodes=[], name="selection")
    append_selection(graph, Builder("selection"), scores, mask)
    model = ir.to_proto(finish(graph, FUNCTIONS, 18))
    onnx.checker.check_model(model, full_check=True)
    return model


MODEL = selection_model()
SESSION = onnxruntime.InferenceSession(MODEL.SerializeToString(), providers=["CPUExecutionProvider"])
REFERENCE = ReferenceEvaluator(MODEL)


def expected(scores, mask, steps, name):
    """Written from the rules, one candidate at a time, in plain Python."""
    count, batch, length = mask.shape
    steps = np.broadcast_to(steps, mask.shape)
    aggregates = np.full((count, batch), np.nan)
    for n in range(count):
        for b in range(batch):
            real = [t for t in range(length) if mask[n, b, t]]
            read = [t for t in real if steps[n, b, t]] or real[-1:]
            values = [float(scores[n, b, t]) for t in read]
            if not values or (name == "last" and math.isnan(values[-1])):
                continue
            if name == "last":
                aggregates[n, b] = values[-1]
            elif not any(map(math.isnan, values)):
                total = {"mean": lambda v: sum(v) / len(v), "min": min, "max": max, "prod": math.prod}[name]
                aggregates[n, b] = total(values)
    best = []
    for b in range(batch):
        usable = [n for n in range(count) if not math.isnan(aggregates[n, b])]
        best.append(max(usable, key=lambda n: (np.float32(aggregates[n, b]), -n)) if usable else -1)
    return aggregates, best


# Few distinct values, so that ties are common; quarters and halves, so that sums and products are exact.
VALUES = st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, -1.0, 2.0, math.nan, math.inf, -math.inf])


@settings(max_examples=300)
@given(data=st.data(), name=st.sampled_from(AGGREGATIONS), engine=st.sampled_from(["ort", "reference"]))
def test_selection_follows_the_rules(data, name, engine):
    shape = tuple(data.draw(st.integers(1, n)) for n in (5, 3, 6))
    size = math.prod(shape)
    finite = data.draw(st.booleans())
    values = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0, 2.0]) if finite else VALUES
    bits = st.lists(st.integers(0, 1), min_size=size, max_size=size)
    scores = np.array(data.draw(st.lists(values, min_size=size, max_size=size)), np.float32).reshape(shape)
    mask, steps = (np.array(data.draw(bits), np.int64).reshape(shape) for _ in range(2))
    if data.draw(st.booleans()):
        steps = np.ones((1, 1, 1), np.int64)
    feeds = plain_selection() | {"scores": scores, "mask": mask, "step_mask": steps}
    feeds["aggregation"] = np.array(AGGREGATIONS.index(name))
    with np.errstate(invalid="ignore"):
        aggregates, best = (SESSION if engine == "ort" else REFERENCE).run(["candidate_scores", "best_index"], feeds)
    wanted, wanted_best = expected(scores, mask, steps, name)
    # inf - inf and 0 * inf are NaN in both.
    np.testing.assert_allclose(aggregates, wanted, rtol=1e-6, atol=0)
    assert best.tolist() == wanted_best


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_long_candidates(name, rng):
    scores = rng.uniform(0.9, 1.0, (7, 2, 700)).astype(np.float32)
    mask = (np.arange(700) < rng.integers(1, 701, (7, 2))[..., None]).astype(np.int64)
    feeds = plain_selection() | {"scores": scores, "mask": mask, "step_mask": rng.integers(0, 2, mask.shape)}
    aggregates, best = SESSION.run(
        ["candidate_scores", "best_index"], feeds | {"aggregation": np.array(AGGREGATIONS.index(name))}
    )
    wanted, wanted_best = expected(scores, mask, feeds["step_mask"], name)
    assert within(aggregates, wanted, RUNTIME)
    assert best.tolist() == wanted_best

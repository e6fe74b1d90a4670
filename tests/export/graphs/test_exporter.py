"""What is spared in the exporter changes no graph."""

import contextlib

import onnx_ir as ir
import pytest

from bonnx.export.graphs import trace
from bonnx.models import build
from bonnx.runtime.artifact.manifest import Scoring


@pytest.mark.parametrize("opset", trace.OPSETS)
def test_graphs_are_those_of_the_plain_exporter(opset, monkeypatch, rng):
    sizes = {"num_heads": 2, "num_kv_heads": int(rng.integers(1, 3)), "scorer_hidden": 4}
    network = build(embed_dim=8, hidden_size=8, num_layers=1, **sizes).eval()
    for name in ("_trace_score", "_trace_rank_prefill", "_trace_rank_cached"):
        monkeypatch.setattr(trace, name, lambda *_: ir.Graph([], [], nodes=[]))
    quickly = dict(trace.trace_graphs(network, Scoring(), opset=opset))
    monkeypatch.setattr(trace, "exported_quickly", contextlib.nullcontext)
    plainly = dict(trace.trace_graphs(network, Scoring(), opset=opset))
    for name, graph in plainly.items():
        written = (ir.to_proto(model).SerializeToString(deterministic=True) for model in (quickly[name], graph))
        assert next(written) == next(written), name

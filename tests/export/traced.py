"""Traces of some of a model's graphs, for tests that look at no others: each takes seconds."""

import onnx_ir as ir
import pytest

from bonnx.export.graphs import trace
from bonnx.runtime.artifact.manifest import Scoring


def generation_graphs(model, *, whole=False):
    """`generate`, `prefill` and `decode` of a language model, by their names."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_trace_score", "_trace_rank", "_trace_rank_prefill", "_trace_rank_cached"):
            patch.setattr(trace, name, lambda *_: ir.Graph([], [], nodes=[]))
        graphs = dict(trace.trace_graphs(model, Scoring(), whole=whole))
    return {name: graphs[name] for name in ("generate", "prefill", "decode")}

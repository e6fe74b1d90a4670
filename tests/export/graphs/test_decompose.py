"""The tracer's shortcut gives the graph of a full decomposition, and programs that need one get it."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from bonnx.export.graphs import trace
from bonnx.export.graphs.decompose import decomposed_lightly
from bonnx.models import build
from bonnx.runtime.artifact.manifest import Scoring
from tests.tolerance import RUNTIME, within


class Converted(nn.Module):
    def forward(self, x):
        """Operators that are replaced one by one."""
        return ((x > 0) & (x < 1)).to(torch.int64) + torch.tensor([1, 2])


class ChangedInPlace(nn.Module):
    def forward(self, x):
        """An operator that changes a tensor."""
        x = x + 1
        x[:, 0].mul_(2)
        return x


class Decomposed(nn.Module):
    def forward(self, x):
        """An operator that ONNX does not have."""
        return nn.functional.huber_loss(x, torch.zeros_like(x), reduction="none")


@pytest.mark.parametrize(("kind", "again"), [(Converted, False), (ChangedInPlace, True), (Decomposed, True)])
def test_a_program_is_traced_again_only_if_it_must_be(kind, again, monkeypatch):
    fully, traced_again = ExportedProgram.run_decompositions, []

    def noted(*arguments, **options):
        traced_again.append(kind)
        return fully(*arguments, **options)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", noted)
    x = torch.randn(3, 2)
    with trace._quiet(), decomposed_lightly():
        program = torch.onnx.export(kind().eval(), (x,), dynamo=True, verbose=False, opset_version=23)
    assert bool(traced_again) == again
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert within(output, kind()(x).numpy(), RUNTIME)


class NumpyTransposed(nn.Module):
    """A scorer whose one operator neither has a converter nor is in the exporter's table."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, width))

    def forward(self, x):
        return x @ self.weight.T


def test_a_scorer_of_the_users_own_may_have_any_operator(monkeypatch, rng):
    torch.manual_seed(int(rng.integers(1000)))
    network = build(embed_dim=8, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, scorer_hidden=4).eval()
    network.scorer = NumpyTransposed(8)
    for name in ("_trace_rank", "_trace_rank_prefill", "_trace_rank_cached"):
        monkeypatch.setattr(trace, name, lambda *_: ir.Graph([], [], nodes=[]))
    graphs = dict(trace.trace_graphs(network, Scoring()))
    session = onnxruntime.InferenceSession(ir.to_proto(graphs["score"]).SerializeToString())
    x = rng.standard_normal((1, 5, 8), np.float32)
    feeds = {"inputs_embeds": x, "attention_mask": np.ones((1, 5), np.int64), "num_candidates": np.array(1)}
    feeds |= {"step_mask": np.ones((1, 1, 1), np.int64), "aggregation": np.array(0), "vote": np.array(0)}
    (scores,) = session.run(["scores"], feeds | {"answer_ids": np.full((1, 1), -1)})
    assert within(scores, network(torch.from_numpy(x))[1].detach().numpy(), RUNTIME)

"""The loop over experts: what PyTorch computes, in ONNX Runtime and the reference evaluator, at every precision."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from bonnx.export.graphs.builder import finish
from bonnx.export.graphs.experts import FUNCTIONS, ExpertsProduct
from bonnx.export.precision.stored import stored
from bonnx.models.config import NetworkConfig
from bonnx.models.experts import Experts


@pytest.mark.filterwarnings("ignore")
# 16 bits differ by a type only, and at int4 the last product has 8.
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_experts_are_those_of_pytorch(precision, rng):
    torch.manual_seed(int(rng.integers(2**31)))
    count = int(rng.integers(2, 7))
    config = NetworkConfig(
        embed_dim=8,
        hidden_size=int(rng.integers(5, 50)) * 8,
        ffn_inner=int(rng.integers(3, 40)),
        ffn_bias=False,
        num_experts=count,
        experts_per_token=int(rng.integers(1, count + 1)),
        normalize_experts=bool(rng.integers(2)),
    )
    experts = Experts(config).eval()
    for expert in experts.experts if precision != "fp32" else ():
        for name in ("gate", "up", "down"):
            bits = "int8" if (precision, name) == ("int4", "down") else precision
            setattr(expert, name, stored(getattr(expert, name), bits))
    with torch.no_grad():
        program = torch.onnx.export(
            ExpertsProduct(experts).eval(),
            (torch.zeros(5, config.hidden_size),),
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
    model = ir.to_proto(finish(program.model.graph, FUNCTIONS, 18))
    onnx.checker.check_model(model)
    session, reference = onnxruntime.InferenceSession(model.SerializeToString()), ReferenceEvaluator(model)
    for rows in (1, int(rng.integers(2, 40))):
        x = rng.standard_normal((rows, config.hidden_size), np.float32)
        with torch.no_grad():
            expected = experts(torch.from_numpy(x)).numpy()
        for run in (session.run, reference.run):
            (out,) = run(None, {session.get_inputs()[0].name: x})
            assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max()

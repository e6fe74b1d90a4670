"""16-bit weights, and every precision on networks whose large numbers break a plain conversion."""

import copy

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import nn

import bonnx
from bonnx.export.artifact import export_model
from bonnx.export.graphs.selection import plain_selection
from bonnx.export.graphs.trace import trace_graphs
from bonnx.export.precision.linear import Embedding16, Linear16
from bonnx.export.precision.outliers import SplitLinear, find_outliers
from bonnx.export.precision.products import Product16
from bonnx.export.precision.quantize import quantized
from bonnx.models import build
from bonnx.models.config import LanguageModelConfig, NetworkConfig
from bonnx.models.network import LanguageModel
from bonnx.runtime.artifact.folder import read_verified
from bonnx.runtime.artifact.manifest import Scoring
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.generate.decoding import decode_all
from bonnx.runtime.generate.request import read_request
from bonnx.runtime.verification import verify

WIDTH, MASSIVE = 64, 3
OPTIONS = {"embed_dim": 24, "hidden_size": WIDTH, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
OPTIONS |= {"scorer_hidden": 16, "final_norm": "rms"}
# Of the scores' standard deviation, root mean square, on the networks of `massive`; without outliers they are the same.
ERRORS = {"fp32": 1e-4, "fp16": 0.003, "bf16": 0.03, "int8": 0.12, "int4": 0.6}


@pytest.fixture
def massive(rng):
    """A network whose first block writes 180000 into a few features of every position, as trained ones do.

    Its other norms have learned to make these features small again. And in every norm some channels are a thousand
    times larger than the others, where the weights that read them are as much smaller.
    """
    torch.manual_seed(int(rng.integers(2**31)))
    network = build(**OPTIONS).eval().requires_grad_(False)
    first = next(network.layers()).ffn
    features = torch.randperm(WIDTH)[:MASSIVE]
    first.gate.weight[5] = first.up.weight[5] = first.down.weight[:, 5] = 0
    first.gate.bias[5], first.up.bias[5] = 30, 100
    first.down.weight[features, 5] = 60 * torch.randn(MASSIVE).sign()

    def learn(norm, inputs):
        size = F.rms_norm(inputs[0], inputs[0].shape[-1:]).flatten(0, -2).square().mean(0).sqrt()
        norm.weight.data = 1 / size

    x = torch.randn(4, 50, 24)
    for norm in [n for b in network.layers() for n in (b.attention_norm, b.ffn_norm)] + [network.final_norm]:
        hook = norm.register_forward_pre_hook(learn)
        network(x)
        hook.remove()
    for block in network.layers():
        attention, ffn = block.attention, block.ffn
        readers = (attention.q_proj, attention.k_proj, attention.v_proj), (ffn.gate, ffn.up)
        for norm, layers in zip((block.attention_norm, block.ffn_norm), readers, strict=True):
            channels = torch.randperm(WIDTH)[:2]
            norm.weight[channels] *= 1000
            for layer in layers:
                layer.weight[:, channels] /= 1000
    return network


def _scores(network, rows):
    with torch.no_grad():
        return network(rows)[1][:, -1, 0].float()


def _error(scores, exact):
    return float((scores - exact).square().mean().sqrt() / exact.std())


def test_a_plain_conversion_overflows_and_ours_selects_as_float32_does(massive):
    rows = torch.randn(64, 7, 24)
    exact = _scores(massive, rows)
    assert not _scores(copy.deepcopy(massive).half(), rows.half()).isfinite().any()
    for precision, allowed in ERRORS.items():
        scores = _scores(quantized(massive, precision), rows)
        assert _error(scores, exact) < allowed, precision
        worse = (exact.max() - exact[scores.argmax()]) / (exact.max() - exact.min())
        assert worse <= (0.3 if precision == "int4" else 0.1), precision


def test_without_their_own_products_outliers_would_leave_eight_bits_nothing(massive):
    twin, rows = quantized(massive, "int8"), torch.randn(32, 7, 24)
    exact = _scores(massive, rows)
    outliers = find_outliers(massive)
    last = list(massive.layers())[1]
    assert len(outliers[last.attention_norm]) >= MASSIVE
    assert 5 in outliers[next(massive.layers()).ffn.down]
    splits = [module for module in twin.modules() if isinstance(module, SplitLinear)]
    assert splits
    for split in splits:
        split.wide.weight.data = torch.zeros_like(split.wide.weight)
    assert _error(_scores(twin, rows), exact) > ERRORS["int8"]
    plain = build(**OPTIONS).eval()
    assert not any(map(len, find_outliers(plain).values()))


@pytest.mark.parametrize(("precision", "opset"), [("fp32", 23), ("fp16", 18), ("int8", 23)])
def test_the_graphs_of_such_a_network_pass_every_check(massive, tmp_path, precision, opset):
    # Among the checks is the reference evaluator, which computes with halves where the graph says so.
    manifest = export_model(massive, tmp_path / "artifact", name="massive", precision=precision, opset=opset)
    assert manifest.agreement is None or manifest.agreement.share >= 0.85
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    prompt, candidates = rng.standard_normal((5, 24), np.float32), list(rng.standard_normal((8, 6, 24), np.float32))
    rows = torch.from_numpy(np.stack([np.concatenate([prompt, candidate]) for candidate in candidates]))
    exact = _scores(massive, rows)
    ranking = bonnx.load(tmp_path / "artifact", provider="cpu").rank(prompt, candidates)
    assert _error(torch.from_numpy(ranking.candidate_scores), exact) < ERRORS[precision]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_graph_keeps_16_bits_and_no_half_overflows(massive, precision):
    _, graph = next(trace_graphs(quantized(massive, precision), Scoring()))
    model = ir.to_proto(graph)
    kind = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.BFLOAT16
    kinds = [t.data_type for t in model.graph.initializer if len(t.dims) == 2]
    # The entry and seven products a layer; the scorer's, and the first column of the shared keys.
    assert sorted(kinds) == sorted([kind] * 15 + [onnx.TensorProto.FLOAT] * 3)
    rows = torch.randn(3, 4, 24)
    feeds = {"inputs_embeds": rows.numpy(), "attention_mask": np.ones((3, 4), np.int64), "num_candidates": np.array(3)}
    feeds |= plain_selection()
    seen = []
    evaluator = ReferenceEvaluator(model)
    for node in evaluator.rt_nodes_:
        if node.onnx_node.op_type == "MatMul":
            run = node.run
            node.run = lambda *args, run=run, **kw: seen.append(args) or run(*args, **kw)
    scores = evaluator.run(["scores"], feeds)[0]
    halves = [args[0] for args in seen if args[0].dtype == np.float16]
    assert len(halves) == (15 if precision == "fp16" else 0)
    assert all(np.isfinite(x).all() for x in halves)
    assert _error(torch.from_numpy(scores[:, -1, 0]), _scores(quantized(massive, precision), rows)) < 0.02


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_weights_that_halves_cannot_hold_are_scaled(size, rng):
    torch.manual_seed(int(rng.integers(2**31)))
    linear = nn.Linear(80, 30).requires_grad_(False)
    linear.weight *= size
    layer = Linear16(linear, torch.float16)
    assert layer.weight.dtype == torch.float16
    assert (layer.scale == 1) == (size == 1)
    # Inputs far beyond the largest half, and rows of zeros.
    x = torch.randn(7, 80) * torch.tensor([1e-6, 1, 100, 1e5, 1e8, 0, 1])[:, None]
    exact = linear(x) - linear.bias
    for output in (layer(x), Product16(layer)(x), Product16(layer, 0.3)(x) / 0.3):
        assert ((output - linear.bias - exact).abs() <= 2e-3 * exact.norm(dim=1, keepdim=True) + 1e-6).all()
    rows = Embedding16(layer)(torch.tensor([3, 29]))
    assert torch.allclose(rows, linear.weight[[3, 29]], rtol=1e-3, atol=1e-4 * size)


def test_16_bit_weights_are_kept_to_the_last_bit(rng):
    torch.manual_seed(int(rng.integers(2**31)))
    for dtype in (torch.float16, torch.bfloat16):
        linear = nn.Linear(50, 40).requires_grad_(False)
        linear.weight.data = linear.weight.to(dtype).float()
        x = torch.randn(9, 50)
        assert torch.equal(Linear16(linear, dtype)(x), linear(x))


def test_rows_of_a_norm_are_scaled_only_if_its_weights_can_overflow_a_half():
    norm, linear = nn.RMSNorm(100), nn.Linear(100, 20)
    assert Linear16(linear, torch.float16, norm).bounded
    assert not Linear16(linear, torch.float16).bounded
    norm.weight.data[7] = 7000
    assert not Linear16(linear, torch.float16, norm).bounded
    shifted = nn.LayerNorm(100)
    shifted.bias.data[7] = 70000
    assert not Linear16(linear, torch.float16, shifted).bounded


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def half(request, tmp_path_factory):
    torch.manual_seed(9)
    network = NetworkConfig(embed_dim=16, hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=2, scorer_hidden=8)
    model = LanguageModel(LanguageModelConfig(network=network, vocab_size=130)).eval()
    folder = tmp_path_factory.mktemp(request.param) / "artifact"
    opset = 23 if request.param == "fp16" else 18
    export_model(model, folder, name="tiny", precision=request.param, opset=opset)
    return folder


def test_an_artifact_of_halves_says_so_and_casts_no_weight_at_every_step(half, tiny):
    manifest, plain = read_verified(half), read_verified(tiny)
    suffix = f"_{manifest.precision}.onnx"
    assert {graph.file for graph in manifest.graphs.values()} == {f"onnx/{name}{suffix}" for name in plain.graphs}
    for name, graph in manifest.graphs.items():
        # This one has a single layer.
        names = [value.name for value in plain.graphs[name].outputs if not value.name.endswith(".1")]
        assert [value.name for value in graph.outputs] == names
    assert manifest.agreement is not None
    for graph in manifest.graphs.values():
        assert {value.dtype for value in (*graph.inputs, *graph.outputs)} == {"float32", "int64"}
    model = onnx.load(half / manifest.graphs["generate"].file)
    (loop,) = [node for node in model.graph.node if node.op_type == "Loop"]
    body = loop.attribute[0].g
    fixed = {tensor.name for tensor in (*model.graph.initializer, *body.initializer)}
    assert not [node for node in body.node if node.op_type == "Cast" and node.input[0] in fixed]
    assert [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in fixed]
    _, checks = verify(half)
    assert len(checks) >= 8


def test_halves_generate_as_the_host_steers_them(half, rng):
    engine, prompt = open_engine(half, provider="cpu"), rng.integers(0, 130, 5)
    options = {"max_new_tokens": 10, "seed": int(rng.integers(2**40))}
    whole = bonnx.Model(engine).generate(prompt, n=6, **options)
    request = read_request(engine, prompt, {"n": 6, **options})
    ids, options = request.prompt, request.options
    *_, last = decode_all(engine, ids, options, None, None)
    same = [np.array_equal(last.tokens[i, : last.lengths[i]], c.tokens) for i, c in enumerate(whole.candidates)]
    assert sum(same) >= 5

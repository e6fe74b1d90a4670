"""One layer of each kind is traced: the graphs are those of a full trace, and every layer keeps its own weights."""

from itertools import islice

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from bonnx.export.graphs import repeat_layers, trace
from bonnx.export.graphs.layers import Trunk
from bonnx.export.graphs.repeat_layers import Repetition
from bonnx.export.graphs.selection import plain_selection
from bonnx.export.graphs.trace import trace_graphs
from bonnx.export.precision.quantize import quantized
from bonnx.models import build
from bonnx.models.config import LanguageModelConfig, NetworkConfig
from bonnx.models.network import LanguageModel
from bonnx.runtime.artifact.manifest import Scoring
from tests.export.traced import generation_graphs

SIZES = {"embed_dim": 32, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "scorer_hidden": 8}
DYNAMIC = {"kind": "dynamic", "factor": 4.0, "original_max_positions": 3}
NETWORKS = {
    "one layer": (23, "fp32", {"num_layers": 1}),
    "opset 18, windows": (18, "fp32", {"num_layers": 5, "sliding_window": 3, "sliding_layers": [1, 2, 4]}),
    "norms": (23, "fp32", {"num_layers": 3, "qk_norm": True, "rope_scaling": DYNAMIC}),
    "norms, int8": (23, "int8", {"num_layers": 3, "qk_norm": True, "rope_scaling": DYNAMIC}),
    "bf16": (23, "bf16", {"num_layers": 3, "ffn_bias": False}),
}
OPTIONS = {"max_new_tokens": 5, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3, "stop_tokens": [2]}
OPTIONS |= {"step_token": 5, "prune_every": 2, "prune_keep": 0.6}


@pytest.fixture(autouse=True)
def _seeded(rng):
    torch.manual_seed(int(rng.integers(2**31)))


def _trunk(model):
    return Trunk(model, Scoring(), fused=True)


def _language_model(**options):
    network = NetworkConfig(**SIZES, **options)
    return LanguageModel(LanguageModelConfig(network=network, vocab_size=50)).eval()


def _feeds(graph, rng):
    """Random inputs of a graph, its axes of random sizes."""
    sizes = {}
    feeds = plain_selection() | {name: np.array(value) for name, value in OPTIONS.items()}
    for value in graph.inputs:
        shape = []
        for axis in value.shape:
            name = axis if isinstance(axis, int) else axis.value
            if name == "prompt_length" and "new_length" in sizes:
                sizes.setdefault(name, sizes["new_length"] + int(rng.integers(0, 4)))
            elif name == "prompt_length + 1":
                name = sizes["prompt_length"] + 1
            elif name == "past_length + 1":
                name = sizes["prompt_length"] - sizes["new_length"] + 1
            shape.append(name if isinstance(name, int) else sizes.setdefault(name, int(rng.integers(2, 7))))
        if "mask" in value.name:
            mask = np.arange(shape[-1]) < rng.integers(1, shape[-1] + 1, shape[:-1])[..., None]
            feeds.setdefault(value.name, mask)
        elif value.name == "num_candidates":
            # `score` divides its rows among the candidates.
            feeds[value.name] = np.array(sizes.get("rows", 3))
        elif value.name in ("prompts", "sources", "lengths"):
            # Rows of other inputs, of which there are at least two, and tokens that these have.
            feeds[value.name] = rng.integers(0, 2, shape)
        elif value.dtype == ir.DataType.INT64:
            feeds.setdefault(value.name, rng.integers(0, 50, shape))
        else:
            feeds.setdefault(value.name, rng.standard_normal(shape))
    return {value.name: feeds[value.name].astype(value.dtype.numpy()) for value in graph.inputs}


def _run(model, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def _surface(model):
    """Inputs, outputs and operators of a graph, but for weights put together, which a full trace does at once."""
    values = [[(v.name, v.dtype, v.shape) for v in part] for part in (model.graph.inputs, model.graph.outputs)]
    fixed = {*model.graph.initializers.values()}
    nodes = [node for part in (model.graph, *model.graph.subgraphs()) for node in part]
    return *values, sorted(n.op_type for n in nodes if n.op_type != "Concat" or not fixed.issuperset(n.inputs))


def _differences(repeated, whole, rng):
    """The outputs that differ between two graphs on random inputs, bit for bit; NaN equals NaN."""
    onnx.checker.check_model(ir.to_proto(repeated), full_check=True)
    different = []
    for _ in range(2):
        feeds = _feeds(repeated.graph, rng)
        for value, a, b in zip(repeated.graph.outputs, _run(repeated, feeds), _run(whole, feeds), strict=True):
            if a.shape != b.shape or not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
                different.append(value.name)
    return different


@pytest.fixture
def traced(monkeypatch):
    """How many layers each trace had, in the order of the traces."""
    layers = []
    export = torch.onnx.export

    def counted(module, *args, **options):
        layers.append(len(module.inner.trunk.layers))
        return export(module, *args, **options)

    monkeypatch.setattr(trace.torch.onnx, "export", counted)
    return layers


# Those that take a minute and a half, and show little that the others do not.
SLOW = {"opset 18, windows", "norms, int8", "bf16"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NETWORKS]
)
def test_the_graphs_are_those_of_a_full_trace(name, traced, rng):
    opset, precision, options = NETWORKS[name]
    # With a single layer `rank` has nothing that `score` has not.
    count = 1 if options["num_layers"] == 1 else 2
    # Fresh biases and norms equal each other: an exporter merges them, which no other layer may notice.
    network = quantized(build(**SIZES, **options).eval(), precision)
    whole = dict(islice(trace_graphs(network, Scoring(), opset=opset, whole=True), count))
    assert traced == [options["num_layers"]] * count
    for graph, model in islice(trace_graphs(network, Scoring(), opset=opset), count):
        assert _surface(model) == _surface(whole[graph])
        assert _differences(model, whole[graph], rng) == []
    if "sliding_window" not in options:
        assert traced[count:] == [min(options["num_layers"], 2)] * count


@pytest.mark.parametrize(
    ("precision", "layers", "windows"),
    [
        pytest.param("fp16", 4, {"sliding_window": 3, "sliding_layers": [1]}, marks=pytest.mark.slow, id="fp16"),
        pytest.param("int8", 3, {}, id="int8"),
    ],
)
def test_generation_and_its_cache_are_those_of_a_full_trace(precision, layers, windows, traced, rng):
    model = quantized(_language_model(num_layers=layers, **windows), precision)
    whole, repeated = generation_graphs(model, whole=True), generation_graphs(model)
    assert traced == [layers] * 3 + [3 if windows else 2] * 3
    assert [value.name for value in repeated["decode"].graph.inputs][-4:] == [
        f"{name}.{layers - 1}" for name in ("prompt_key", "prompt_value", "key", "value")
    ]
    for graph in whole:
        assert _surface(repeated[graph]) == _surface(whole[graph])
        assert _differences(repeated[graph], whole[graph], rng) == []


def test_layers_of_one_kind_are_traced_once(traced):
    alike = Repetition(_trunk(_language_model(num_layers=24)))
    assert alike.traced == [0, 23]
    windows = Repetition(_trunk(_language_model(num_layers=7, sliding_window=3, sliding_layers=[2, 3, 6])))
    assert windows.traced == [0, 2, 6]
    _, score = next(trace_graphs(_language_model(num_layers=6), Scoring()))
    assert traced == [2]
    assert sum(name.endswith("down.weight") for name in score.graph.initializers) == 6


def test_what_the_nodes_depend_on_makes_a_kind():
    def kinds(change):
        network = build(**SIZES, num_layers=4).eval().requires_grad_(False)
        change([*network.layers()][1])
        return Repetition(_trunk(network)).traced

    def narrow(block):
        block.ffn.gate, block.ffn.up, block.ffn.down = (torch.nn.Linear(*size) for size in ((32, 8), (32, 8), (8, 32)))

    assert kinds(lambda block: block.ffn.down.weight.mul_(1000)) == [0, 3]
    assert kinds(lambda block: setattr(block.ffn_norm, "eps", 1e-3)) == [0, 1, 3]
    assert kinds(lambda block: block.ffn.gate.register_parameter("bias", None)) == [0, 1, 3]
    assert kinds(narrow) == [0, 1, 3]


def test_every_layer_has_its_own_weights_and_they_are_no_copies():
    network = build(**SIZES, num_layers=4).eval()
    weights = next(trace_graphs(network, Scoring()))[1].graph.initializers
    for i, block in enumerate(network.layers()):
        expected = block.ffn.down.weight.detach().numpy()
        found = weights[f"trunk.layers.{i}.down.weight"].const_value.numpy()
        assert np.array_equal(found, expected.T)
        assert np.shares_memory(found, expected)


def test_a_change_in_one_layer_changes_no_other():
    network = build(**SIZES, num_layers=4).eval().requires_grad_(False)

    def initializers():
        graph = next(trace_graphs(network, Scoring()))[1].graph
        return graph, {name: value.const_value.numpy().copy() for name, value in graph.initializers.items()}

    # All norms have weights of ones, which are one initializer before the change.
    _, before = initializers()
    [*network.layers()][1].attention_norm.weight[2] = 7
    graph, after = initializers()
    name = "trunk.layers.1.attention_norm.weight"
    assert {key for key in after if not np.array_equal(after[key], before.get(key))} == {name}
    assert after[name][1:4].tolist() == [1, 7, 1]
    assert len(graph.initializers[name].uses()) == 1


def test_a_dropped_mark_is_noticed(monkeypatch):
    monkeypatch.setattr(repeat_layers, "_marks", lambda graph: [])
    with pytest.raises(AssertionError, match="dropped a mark"):
        next(iter(trace_graphs(build(**SIZES, num_layers=2).eval(), Scoring())))

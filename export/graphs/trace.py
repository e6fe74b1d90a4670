"""Trace PyTorch modules to ONNX graphs with named dynamic axes, and add selection and sampling around them."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bonnx.models.network import LanguageModel, TwoHeadedNetwork
from bonnx.runtime.artifact.manifest import Scoring

from ..precision.products import VocabularyHead
from ..precision.widen import widened
from ..stages import Report, silent
from . import experts, sampling, selection
from .blocks import attention_functions
from .builder import Builder, finish, name_value
from .decompose import decomposed_lightly
from .exporter import exported_quickly
from .generate_loop import generate_graph
from .generate_passes import PromptPass, RowsPass, TokenPass
from .layers import Trunk
from .prefill_decode import decode_graph, prefill_graph
from .rank import RankGraph
from .rank_cached import RankCachedGraph, RankPrefillGraph
from .repeat_layers import Opened, Repetition
from .score import ScoreGraph
from .selection import append_selection
from .static_decode import StaticPass, draw_plain, resize_graph, static_graph, uniforms_graph

__all__ = ["DEFAULT_OPSET", "OPSETS", "trace_graphs"]

DEFAULT_OPSET = 23
# ONNX has RMSNormalization and RotaryEmbedding from opset 23 on; at 18 both are decomposed.
OPSETS = (18, 23)


class _Traced(NamedTuple):
    """The trunk to trace, and how."""

    trunk: Trunk
    opset: int
    repetition: Repetition | None
    """None if the trunk has all of its layers."""

    @property
    def layers(self) -> Sequence[int]:
        """The numbers of the layers that are traced."""
        return range(self.trunk.config.num_layers) if self.repetition is None else self.repetition.traced


def trace_graphs(
    model: LanguageModel | TwoHeadedNetwork,
    scoring: Scoring,
    *,
    opset: int = DEFAULT_OPSET,
    static: bool = False,
    whole: bool = False,
    report: Report = silent,
) -> Iterator[tuple[str, ir.Model]]:
    """Yield the graphs of a model in inference mode by name, weights included.

    A model with a scorer has `score`, `rank`, `rank_prefill` and `rank_cached`.

    One with a vocabulary head has `generate`, `prefill` and `decode`, and with `static` also `decode_static`,
    `uniforms` and `resize_cache`. The graphs are made one at a time, so that those already written need not stay in
    memory.

    With `whole`, which is for tests, every layer is traced, even if it is like another one. `report` is told what is
    traced.
    """
    functions = [*sampling.FUNCTIONS, draw_plain, *selection.FUNCTIONS, *experts.FUNCTIONS]
    network = model.config.network if isinstance(model, LanguageModel) else model.config
    for name, graph in _graphs(model, scoring, opset, static, whole, report):
        # A model keeps its functions, so each gets its own.
        yield name, finish(graph, [*functions, *attention_functions(network)], opset)
        del graph


def _graphs(
    model: LanguageModel | TwoHeadedNetwork, scoring: Scoring, opset: int, static: bool, whole: bool, report: Report
) -> Iterator[tuple[str, ir.Graph]]:
    trunk = Trunk(model, scoring, fused=opset >= 23).eval()
    width = None if isinstance(model, LanguageModel) else trunk.config.embed_dim
    traced = _Traced(trunk, opset, None if whole else Repetition(trunk))
    if trunk.config.has_scorer:
        report("tracing score")
        yield "score", _trace_score(traced, width, scoring)
        report("tracing rank")
        yield "rank", _trace_rank(traced, width, scoring)
        report("tracing rank after a cached prompt")
        yield "rank_prefill", _trace_rank_prefill(traced, width)
        yield "rank_cached", _trace_rank_cached(traced, width, scoring)
    if isinstance(model, LanguageModel) and model.config.vocabulary_head:
        report("tracing generate")
        head = VocabularyHead(model)
        prompt_pass, token_pass = _trace_prompt_pass(traced, head), _trace_token_pass(traced, head)
        passes = (widened(prompt_pass.clone(), ir.DataType.FLOAT16), widened(token_pass, ir.DataType.FLOAT16))
        yield "generate", generate_graph(*passes, trunk.config, scoring.pad_token)
        report("tracing decode")
        yield "prefill", prefill_graph(prompt_pass)
        yield "decode", decode_graph(_trace_rows_pass(traced, RowsPass(trunk, head)))
        if static:
            report("tracing decode with a static cache")
            yield "decode_static", static_graph(_trace_rows_pass(traced, StaticPass(trunk, head)))
            yield "uniforms", uniforms_graph()
            yield "resize_cache", resize_graph(trunk.config)


def _example(*shape: int, width: int | None = None) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64) if width is None else torch.zeros((*shape, width))


def _trace_score(traced: _Traced, width: int | None, scoring: Scoring) -> ir.Graph:
    # All sizes differ and none is 1: the tracer takes equal sizes for the same axis, and 1 for a constant.
    examples = {"input_ids" if width is None else "inputs_embeds": _example(6, 5, width=width)}
    examples["attention_mask"] = torch.ones(6, 5, dtype=torch.int64)
    rows = ["rows", "sequence"]
    outputs: dict[str, Sequence[str | None]] = {"backbone": rows, "scores": rows}
    outputs |= {"objectives": rows} if traced.trunk.header else {}
    graph = _trace(traced, ScoreGraph(traced.trunk), examples, [rows, rows], outputs)
    count = ir.val("num_candidates", ir.DataType.INT64, [])
    graph.inputs.append(count)
    b = Builder("selection")
    mask, scores = graph.inputs[1], graph.outputs[1]
    length = b.Shape(mask, start=1)
    # Not `Unsqueeze`, which ONNX Runtime would run on a GPU, copying the count there and the result back.
    counts = b.Add(count, b.Sub(length, length))
    shape = b.Concat(counts, b.ints(-1), length, axis=0)
    append_selection(graph, b, b.Reshape(scores, shape), b.Reshape(mask, shape), scoring.vote_weight)
    return graph


def _trace_rank(traced: _Traced, width: int | None, scoring: Scoring) -> ir.Graph:
    suffix = "ids" if width is None else "embeds"
    examples = {
        f"prompt_{suffix}": _example(2, 5, width=width),
        "prompt_mask": torch.ones(2, 5, dtype=torch.int64),
        f"candidate_{suffix}": _example(3, 2, 4, width=width),
        "candidate_mask": torch.ones(3, 2, 4, dtype=torch.int64),
    }
    prompt, candidate = ["batch", "prompt_length"], ["num_candidates", "batch", "length"]
    axes = [prompt, prompt, candidate, candidate]
    graph = _trace(traced, RankGraph(traced.trunk), examples, axes, _candidate_outputs(traced, candidate))
    append_selection(graph, Builder("selection"), graph.outputs[0], graph.inputs[3], scoring.vote_weight)
    return graph


def _trace_rank_prefill(traced: _Traced, width: int | None) -> ir.Graph:
    examples = {f"prompt_{'ids' if width is None else 'embeds'}": _example(2, 4, width=width)}
    examples["prompt_mask"] = torch.ones(2, 9, dtype=torch.int64)
    axes: list[Sequence[str | None]] = [["batch", "new_length"], ["batch", "prompt_length"]]
    for name, names in _cache_axes(traced.layers, candidates=False):
        examples[name.replace("prompt", "past")] = torch.zeros(_prompt_shape(traced, name, 6))
        axes.append([axis and axis.replace("prompt", "past") for axis in names])
    outputs: dict[str, Sequence[str | None]] = dict(_cache_axes(traced.layers, candidates=False))
    if traced.trunk.header:
        examples |= {"past_gate": torch.zeros(2, traced.trunk.config.num_labels), "gate_position": _example(2)}
        axes += [["batch"], ["batch"]]
        outputs["prompt_gate"] = ["batch"]
    return _trace(traced, RankPrefillGraph(traced.trunk), examples, axes, outputs)


def _trace_rank_cached(traced: _Traced, width: int | None, scoring: Scoring) -> ir.Graph:
    prompt, candidate = ["batch", "prompt_length"], ["num_candidates", "batch", "length"]
    examples = {"prompt_mask": torch.ones(2, 5, dtype=torch.int64)}
    examples[f"candidate_{'ids' if width is None else 'embeds'}"] = _example(3, 2, 4, width=width)
    examples["candidate_mask"] = torch.ones(3, 2, 4, dtype=torch.int64)
    axes: list[Sequence[str | None]] = [prompt, candidate, candidate]
    for name, names in _cache_axes(traced.layers, candidates=False):
        examples[name] = torch.zeros(_prompt_shape(traced, name, 5))
        axes.append(names)
    if traced.trunk.header:
        examples["prompt_gate"] = torch.zeros(2, traced.trunk.config.num_labels)
        axes.append(["batch"])
    graph = _trace(traced, RankCachedGraph(traced.trunk), examples, axes, _candidate_outputs(traced, candidate))
    append_selection(graph, Builder("selection"), graph.outputs[0], graph.inputs[2], scoring.vote_weight)
    return graph


def _candidate_outputs(traced: _Traced, axes: Sequence[str]) -> dict[str, Sequence[str | None]]:
    """The outputs of `rank`, before those of the selection, and their axes."""
    return {"scores": axes, **({"objectives": axes} if traced.trunk.header else {})}


def _prompt_shape(traced: _Traced, name: str, length: int) -> tuple[int, ...]:
    """The shape of a tensor of two prompts' cache in an example, by its name."""
    heads, size = traced.trunk.config.num_kv_heads, traced.trunk.config.size_of_head
    return (2, heads, size + 2, length + 1) if name.startswith("prompt_key") else (2, heads, length + 1, size)


def _trace_prompt_pass(traced: _Traced, head: VocabularyHead) -> ir.Graph:
    examples = {"input_ids": _example(2, 4), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    axes: list[Sequence[str | None]] = [["batch", "new_length"], ["batch", "prompt_length"]]
    for name, names in _cache_axes(traced.layers, candidates=False):
        examples[name.replace("prompt", "past")] = torch.zeros(_prompt_shape(traced, name, 6))
        axes.append([axis and axis.replace("prompt", "past") for axis in names])
    outputs: dict[str, Sequence[str | None]] = {"logits": ["batch"]}
    outputs |= {} if traced.trunk.config.has_scorer else {"certainty": ["batch"]}
    outputs |= dict(_cache_axes(traced.layers, candidates=False))
    return _trace(traced, PromptPass(traced.trunk, head), examples, axes, outputs)


def _trace_token_pass(traced: _Traced, head: VocabularyHead) -> ir.Graph:
    config = traced.trunk.config
    heads, size = config.num_kv_heads, config.size_of_head
    rows = ["num_candidates", "batch"]
    examples = {"tokens": _example(3, 2), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    axes: list[list[str | None]] = [[*rows], ["batch", "prompt_length"]]
    shapes: dict[str, tuple[int, ...]] = {"prompt_key": (2, heads, size + 2, 6), "prompt_value": (2, heads, 6, size)}
    shapes |= dict.fromkeys(("key", "value"), (3, 2, heads, 4, size))
    for name, names in _cache_axes(traced.layers, candidates=True):
        examples[name] = torch.zeros(shapes[name.split(".")[0]])
        axes.append(names)
    outputs: dict[str, Sequence[str | None]] = {"scores" if config.has_scorer else "certainties": rows, "logits": rows}
    outputs |= {
        f"grown_{name}": [*rows, None, "grown_length"]
        for name, _ in _cache_axes(traced.layers, candidates=True)
        if not name.startswith("prompt")
    }
    return _trace(traced, TokenPass(traced.trunk, head), examples, axes, outputs)


def _trace_rows_pass(traced: _Traced, rows_pass: RowsPass) -> ir.Graph:
    config = traced.trunk.config
    heads, size = config.num_kv_heads, config.size_of_head
    rows: list[str | None] = ["rows"]
    # What the own cache has: a place for the new token, too, or as many before as after it.
    static = isinstance(rows_pass, StaticPass)
    places, own_length, grown_length = ("slots",) * 3 if static else ("ages", "own_length", "grown_length")
    examples = {
        "tokens": _example(7),
        "prompts": torch.zeros(7, dtype=torch.int64),
        "lengths": torch.zeros(7, dtype=torch.int64),
        places: torch.arange(4 if static else 5),
        "places": torch.zeros(2, 3, dtype=torch.int64),
        "back": torch.zeros(7, dtype=torch.int64),
        "attention_mask": torch.ones(2, 5, dtype=torch.int64),
    }
    axes: list[list[str | None]] = [rows, rows, rows, [places], ["batch", "width"], rows, ["batch", "prompt_length"]]
    own, grown = ["rows", None, own_length], ["rows", None, grown_length]
    outputs: dict[str, Sequence[str | None]] = {"scores" if config.has_scorer else "certainties": rows, "logits": rows}
    for i in traced.layers:
        for kind in ("key", "value"):
            shape = _prompt_shape(traced, f"prompt_{kind}", 5)
            examples[f"prompt_{kind}.{i}"] = torch.zeros(shape)
            axes.append(dict(_cache_axes([i], candidates=False))[f"prompt_{kind}.{i}"])
        for kind in ("key", "value"):
            examples[f"{kind}.{i}"] = torch.zeros(7, heads, 4, size)
            axes.append([*own])
            outputs[f"grown_{kind}.{i}"] = grown
    return _trace(traced, rows_pass, examples, axes, outputs)


def _cache_axes(layers: Iterable[int], *, candidates: bool) -> Iterator[tuple[str, list[str | None]]]:
    """Yield the names of the cache's tensors, layer by layer, and their dynamic axes; None is a fixed axis."""
    for i in layers:
        yield f"prompt_key.{i}", ["batch", None, None, "prompt_length + 1"]
        yield f"prompt_value.{i}", ["batch", None, "prompt_length + 1"]
        if candidates:
            yield f"key.{i}", ["num_candidates", "batch", None, "own_length"]
            yield f"value.{i}", ["num_candidates", "batch", None, "own_length"]


def _trace(
    traced: _Traced,
    module: nn.Module,
    examples: dict[str, Tensor],
    axes: Sequence[Sequence[str | None]],
    outputs: dict[str, Sequence[str | None]],
) -> ir.Graph:
    """Trace a module. Named axes are dynamic; an axis without a name, or not listed in `axes`, has a fixed size."""
    shapes = tuple({i: torch.export.Dim.DYNAMIC for i, name in enumerate(names) if name} for names in axes)
    weights = {} if traced.repetition is None else traced.repetition.weights()

    def export() -> torch.onnx.ONNXProgram | None:
        return torch.onnx.export(
            Opened(module, weights).eval(),
            (tuple(weights.values()), *examples.values()),
            input_names=[*weights, *examples],
            output_names=list(outputs),
            dynamic_shapes=(({},) * len(weights), shapes),
            opset_version=traced.opset,
            dynamo=True,
            verbose=False,
        )

    with _quiet(), _fast(), exported_quickly(), torch.no_grad():
        try:
            with decomposed_lightly():
                program = export()
        except torch.onnx.errors.OnnxExporterError:
            # A scorer or norm of the user's may have operators that need more.
            program = export()
    assert program is not None
    graph = program.model.graph
    for values, names in ((graph.inputs[len(weights) :], axes), (graph.outputs, outputs.values())):
        for value, dimensions in zip(values, names, strict=True):
            assert value.shape is not None
            assert value.dtype is not None
            assert value.name is not None
            shape: list[int | str | ir.SymbolicDim] = [*value.shape]
            shape[: len(dimensions)] = [name or size for name, size in zip(dimensions, shape, strict=False)]
            name_value(value, value.name, value.dtype, shape)
    for value in [*graph.initializers.values()]:
        value.name = str(value.name).removeprefix("inner.")
    if traced.repetition is not None:
        traced.repetition.repeat(graph)
    widened(graph, ir.DataType.BFLOAT16)
    _keep_fusable(graph)
    # The tracer's metadata about intermediate values and source locations is useless to a runtime.
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = None
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    return graph


@contextlib.contextmanager
def _fast() -> Iterator[None]:
    """Spare a fifth of the time or more; the graph is the same.

    PyTorch's cache of shapes builds each tensor twice in order to remember it, and the garbage collector walks through
    millions of objects that are all in use.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        if collected:
            gc.enable()


def _keep_fusable(graph: ir.Graph) -> None:
    """Multiply the scales of 8-bit products by a 1 that is computed in the graph.

    ONNX Runtime fuses a product, its scale and its bias into one kernel only if the scale is not a constant.
    """
    products = [node for node in graph if node.op_type == "MatMulInteger"]
    if not products:
        return
    b = Builder("one")
    one = b.Cast(b.Greater(b.Shape(graph.inputs[0], start=0, end=1), b.ints(-1)), to=ir.DataType.FLOAT)
    for product in products:
        (cast,) = product.outputs[0].consumers()
        (scaled,) = cast.outputs[0].consumers()
        assert scaled.op_type == "Mul"
        times_one = ir.node("Mul", [one, scaled.inputs[1]])
        scaled.replace_input_with(1, times_one.outputs[0])
        graph.insert_before(scaled, [times_one])
    for value in b.initializers:
        graph.register_initializer(value)
    graph.insert_before(graph[0], b.nodes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's reports about operators of packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""PyTorch modules become ONNX graphs with named dynamic axes and the selection appended."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from torch import Tensor, nn

from ..models.network import LanguageModel, TwoHeadedNetwork
from ..runtime.manifest import Scoring
from .layers import Trunk
from .rank_graph import RankGraph
from .score_graph import ScoreGraph
from .selection import append_selection

__all__ = ["DEFAULT_OPSET", "OPSETS", "trace_graphs"]

DEFAULT_OPSET = 23
# From 23 on, ONNX has RMSNormalization and RotaryEmbedding; at 18 both are decomposed.
OPSETS = (18, 23)


def trace_graphs(
    model: LanguageModel | TwoHeadedNetwork, scoring: Scoring, *, opset: int = DEFAULT_OPSET
) -> dict[str, onnx.ModelProto]:
    """The graphs `score` and `rank` of a model in inference mode, weights inside, float32."""
    trunk = Trunk(model, activation=scoring.activation, label=scoring.label, fused=opset >= 23).eval()
    ids = isinstance(model, LanguageModel)
    width = None if ids else trunk.config.embed_dim
    return {
        "score": _trace_score(trunk, width, opset),
        "rank": _trace_rank(trunk, width, opset),
    }


def _example(*shape: int, width: int | None) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64) if width is None else torch.zeros((*shape, width))


def _trace_score(trunk: Trunk, width: int | None, opset: int) -> onnx.ModelProto:
    # Sizes that no other axis has: equal ones would be taken for the same axis, and 1 for a constant.
    examples = {"input_ids" if width is None else "inputs_embeds": _example(6, 5, width=width)}
    examples["attention_mask"] = torch.ones(6, 5, dtype=torch.int64)
    rows = ["rows", "sequence"]
    model = _trace(ScoreGraph(trunk), examples, [rows, rows], {"backbone": [*rows], "scores": [*rows]}, opset)
    graph = model.graph
    graph.input.append(onnx.helper.make_tensor_value_info("num_candidates", onnx.TensorProto.INT64, []))
    graph.initializer.append(onnx.numpy_helper.from_array(torch.tensor([-1]).numpy(), "candidates/rest"))
    graph.initializer.append(onnx.numpy_helper.from_array(torch.tensor([0]).numpy(), "candidates/axis"))
    node = onnx.helper.make_node
    graph.node.extend(
        [
            node("Unsqueeze", ["num_candidates", "candidates/axis"], ["candidates/count"], "candidates/count"),
            node("Shape", ["attention_mask"], ["candidates/length"], "candidates/length", start=1),
            node(
                "Concat",
                ["candidates/count", "candidates/rest", "candidates/length"],
                ["candidates/shape"],
                "candidates/shape",
                axis=0,
            ),
            node("Reshape", ["attention_mask", "candidates/shape"], ["candidates/mask"], "candidates/mask"),
            node("Reshape", ["scores", "candidates/shape"], ["candidates/scores"], "candidates/scores"),
        ]
    )
    append_selection(model, scores="candidates/scores", mask="candidates/mask")
    return model


def _trace_rank(trunk: Trunk, width: int | None, opset: int) -> onnx.ModelProto:
    suffix = "ids" if width is None else "embeds"
    examples = {
        f"prompt_{suffix}": _example(2, 5, width=width),
        "prompt_mask": torch.ones(2, 5, dtype=torch.int64),
        f"candidate_{suffix}": _example(3, 2, 4, width=width),
        "candidate_mask": torch.ones(3, 2, 4, dtype=torch.int64),
    }
    prompt, candidate = ["batch", "prompt_length"], ["num_candidates", "batch", "length"]
    model = _trace(RankGraph(trunk), examples, [prompt, prompt, candidate, candidate], {"scores": candidate}, opset)
    append_selection(model, scores="scores", mask="candidate_mask")
    return model


def _trace(
    module: nn.Module,
    examples: dict[str, Tensor],
    axes: list[list[str]],
    outputs: dict[str, list[str]],
    opset: int,
) -> onnx.ModelProto:
    """Trace with every leading axis dynamic and named; a last axis beyond `axes` is a fixed width."""
    shapes = tuple(dict.fromkeys(range(len(names)), torch.export.Dim.DYNAMIC) for names in axes)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            tuple(examples.values()),
            input_names=list(examples),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _name_axes(model.graph.input, dict(zip(examples, axes, strict=True)))
    _name_axes(model.graph.output, outputs)
    # Shapes of inner values name the tracer's own symbols; runtimes infer them again from the named axes.
    del model.graph.value_info[:], model.metadata_props[:], model.graph.metadata_props[:]
    for entry in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del entry.metadata_props[:]
        entry.doc_string = ""
    model.producer_name, model.producer_version = "bonnx", ""
    return model


def _name_axes(values: list[onnx.ValueInfoProto], axes: dict[str, list[str]]) -> None:
    for value in values:
        for dimension, name in zip(value.type.tensor_type.shape.dim, axes[value.name], strict=False):
            dimension.dim_param = name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports operators of packages that are not installed; nothing there concerns our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

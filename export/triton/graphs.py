"""Adapt an artifact's graphs to Triton Inference Server: request axis first, no scalars, a fixed scoring rule.

Triton batches requests along the first axis, which every input and output must have, and does not support scalars. So
the graphs get the request axis first, by transposing inputs and outputs, and the artifact's scoring rule as constants.
Each option of `generate` is a column, one value for each request.

Shapes: N candidates, B requests, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from bonnx.runtime.artifact.folder import locate
from bonnx.runtime.artifact.manifest import Manifest, Scoring
from bonnx.runtime.selection.aggregate import aggregation_code, is_stepwise

from ..graphs.builder import Builder, finish, name_value

__all__ = ["triton_graphs"]

INT = ir.DataType.INT64
# The options of `generate` that a request sets; the others are fixed by the artifact's rule or disabled.
OPTIONS = ("num_candidates", "max_new_tokens", "temperature", "top_k", "top_p", "seed")


def triton_graphs(artifact: Path, manifest: Manifest) -> Iterator[tuple[str, ir.Model]]:
    """Yield each graph's name and model; the weights stay in the file that the artifact's graphs share.

    `generate` is omitted if the caller must mark the ends of steps, which is impossible before they are generated.
    """
    for name, wrap in _WRAPPERS.items():
        if name not in manifest.graphs or (name == "generate" and not _generates(manifest.scoring)):
            continue
        model = ir.load(locate(artifact, manifest.graphs[name].file))
        wrap(_Interface(model.graph), manifest.scoring)
        finished = finish(model.graph, (), model.graph.opset_imports[""])
        RemoveUnusedNodesPass()(finished)
        yield name, finished


class _Interface:
    """Replaces a graph's inputs and outputs one by one."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.before, self.after = Builder("triton/before"), Builder("triton/after")
        self._old = {str(value.name): value for value in graph.inputs}
        self._results = {str(value.name): value for value in graph.outputs}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def reshape_input(self, name: str, shape: Sequence[int | str], change: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """Give an input another shape; `change` converts it to the value that the graph reads."""
        old = self._old[name]
        assert old.dtype is not None
        new = ir.val(name, old.dtype, shape)
        self._inputs.append(new)
        self.replace_input(name, change(new))
        return new

    def keep_input(self, name: str, shape: Sequence[int | str]) -> ir.Value:
        """Keep an input, with new names for its axes."""
        value = self._old.pop(name)
        value.shape = ir.Shape(shape)
        self._inputs.append(value)
        return value

    def replace_input(self, name: str, value: ir.Value | NDArray[np.generic]) -> None:
        """Replace an input by a value or a constant."""
        replacement = value if isinstance(value, ir.Value) else self.before.constant(value)
        self._old.pop(name).replace_all_uses_with(replacement)

    def take_output(self, name: str) -> ir.Value:
        """Remove an output from the graph and return its value; the name may be used again."""
        value = self._results.pop(name)
        value.name = f"triton/{name}"
        return value

    def add_output(self, name: str, value: ir.Value, like: ir.Value, shape: Sequence[int | str]) -> None:
        """Add an output with the dtype of another value."""
        assert like.dtype is not None
        self._outputs.append(name_value(value, name, like.dtype, shape))

    def close(self) -> None:
        """Apply the changes to the graph; every input must have been handled, and outputs not added are dropped."""
        assert not self._old, f"nothing feeds {', '.join(self._old)}"
        for values, new in ((self.graph.inputs, self._inputs), (self.graph.outputs, self._outputs)):
            values.clear()
            values.extend(new)
        for builder in (self.before, self.after):
            for value in builder.initializers:
                self.graph.register_initializer(value)
        self.graph.insert_before(self.graph[0], self.before.nodes)
        self.graph.extend(self.after.nodes)


def _rank(interface: _Interface, scoring: Scoring) -> None:
    """Prompts (B, P), candidates (B, N, T) -> scores (B, N, T), candidate_scores (B, N), best_index (B, 1)."""
    graph, before, after = interface.graph, interface.before, interface.after
    prompt, prompt_mask, candidate, candidate_mask = (str(value.name) for value in graph.inputs[:4])
    width = _width(graph.inputs[0], 2)
    table = ["batch", "num_candidates", "length"]
    interface.keep_input(prompt, ["batch", "prompt_length", *width])
    interface.keep_input(prompt_mask, ["batch", "prompt_length"])
    swap = [1, 0, 2, 3]
    ids = interface.reshape_input(
        candidate, [*table, *width], lambda x: before.Transpose(x, perm=swap[: 3 + len(width)])
    )
    interface.reshape_input(candidate_mask, table, lambda x: before.Transpose(x, perm=swap[:3]))
    _fix_rule(interface, scoring, None if width else ids, table, lambda x: before.Transpose(x, perm=swap[:3]))
    for name, axes in (("scores", table), ("candidate_scores", table[:2])):
        value = interface.take_output(name)
        interface.add_output(name, after.Transpose(value, perm=swap[: len(axes)]), value, axes)
    best = interface.take_output("best_index")
    interface.add_output("best_index", after.Unsqueeze(best, after.ints(1)), best, ["batch", 1])
    interface.close()


def _score(interface: _Interface, scoring: Scoring) -> None:
    """Independent rows (B, T) -> scores (B, T, 1), row_scores (B, 1), backbone (B, T, D), without a selection."""
    graph, before = interface.graph, interface.before
    rows, mask = (str(value.name) for value in graph.inputs[:2])
    width = _width(graph.inputs[0], 2)
    axes = ["batch", "sequence"]
    values = interface.keep_input(rows, [*axes, *width])
    interface.keep_input(mask, axes)
    # The rows are treated as candidates of one prompt, so that their scores are (B, 1).
    interface.replace_input("num_candidates", before.Squeeze(before.Shape(values, start=0, end=1), before.ints(0)))
    _fix_rule(interface, scoring, None if width else values, axes, lambda x: before.Unsqueeze(x, before.ints(1)))
    outputs: dict[str, tuple[str, list[int | str]]] = {
        "scores": ("scores", [*axes, 1]),
        "candidate_scores": ("row_scores", ["batch", 1]),
        "backbone": ("backbone", [*axes, *_width(graph.outputs[0], 2)]),
    }
    for name, (new_name, shape) in outputs.items():
        value = interface.take_output(name)
        interface.add_output(new_name, value, value, shape)
    interface.close()


def _generate(interface: _Interface, scoring: Scoring) -> None:
    """Prompts (B, P), options (B, 1) -> sequences, scores, log_probs (B, N, T), lengths and others (B, N)."""
    before, after = interface.before, interface.after
    for name in ("input_ids", "attention_mask"):
        interface.keep_input(name, ["batch", "prompt_length"])
    for name in OPTIONS:
        interface.reshape_input(name, ["batch", 1], lambda x: before.Squeeze(x, before.ints(1)))
    step_token = scoring.step_token if is_stepwise(scoring.aggregation) else None
    stops = [token for token in (scoring.end_token, *scoring.stop_tokens) if token is not None]
    interface.replace_input("stop_tokens", np.array(stops, np.int64))
    interface.replace_input("aggregation", np.array(aggregation_code(scoring.aggregation), np.int64))
    interface.replace_input("step_token", np.array(-1 if step_token is None else step_token, np.int64))
    interface.replace_input("prune_every", np.array(0, np.int64))
    interface.replace_input("prune_keep", np.array(1, np.float32))
    table = ["batch", "num_candidates", "length"]
    for name in ("sequences", "lengths", "scores", "log_probs", "finish_reasons", "candidate_scores"):
        value = interface.take_output(name)
        assert value.shape is not None
        axes = table[: len(value.shape)]
        interface.add_output(name, after.Transpose(value, perm=[1, 0, 2][: len(axes)]), value, axes)
    best = interface.take_output("best_index")
    interface.add_output("best_index", after.Unsqueeze(best, after.ints(1)), best, ["batch", 1])
    winners = interface.take_output("best_sequence")
    interface.add_output("best_sequence", winners, winners, ["batch", "length"])
    interface.close()


_WRAPPERS: dict[str, Callable[[_Interface, Scoring], None]] = {"rank": _rank, "score": _score, "generate": _generate}


def _fix_rule(
    interface: _Interface,
    scoring: Scoring,
    ids: ir.Value | None,
    shape: Sequence[str],
    transpose: Callable[[ir.Value], ir.Value],
) -> None:
    """Build in the artifact's scoring rule: which positions are read, and how; as `Model` applies it, without a vote.

    Args:
        interface: loses `aggregation`, `answer_ids` and `vote`, and `step_mask` unless the caller must provide it.
        scoring: the rule.
        ids: a request's token ids, with the shape of its mask; None for embeddings.
        shape: the shape of that mask.
        transpose: converts a value of that shape to the shape that the graph reads.
    """
    before, name = interface.before, scoring.aggregation
    interface.replace_input("aggregation", np.array(aggregation_code(name), np.int64))
    interface.replace_input("answer_ids", np.full((1, 1), -1, np.int64))
    interface.replace_input("vote", np.array(0, np.int64))
    if is_stepwise(name) and (ids is None or scoring.step_token is None):
        interface.reshape_input("step_mask", shape, transpose)
    elif is_stepwise(name):
        interface.replace_input(
            "step_mask", transpose(before.Cast(before.Equal(ids, before.int(scoring.step_token or 0)), to=INT))
        )
    elif name == "last" and scoring.passes_pad and ids is not None:
        padding = before.Equal(ids, before.int(scoring.pad_token))
        interface.replace_input("step_mask", transpose(before.Cast(before.Not(padding), to=INT)))
    else:
        interface.replace_input("step_mask", np.ones((1, 1, 1), np.int64))


def _generates(scoring: Scoring) -> bool:
    return not is_stepwise(scoring.aggregation) or scoring.step_token is not None


def _width(value: ir.Value, axes: int) -> list[int]:
    """Return the fixed axes after the first ones."""
    assert value.shape is not None
    return [axis for axis in value.shape[axes:] if isinstance(axis, int)]

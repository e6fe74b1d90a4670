"""The graphs of an artifact as Triton Inference Server takes them: requests first, no scalars, one scoring rule.

Triton joins requests along the first axis, which every input and output must then have, and knows no scalars. So
`rank` and `score` get the request's axis in front, by transpositions at the borders, and the artifact's scoring rule
as constants; `generate`, whose options belong to a whole run, keeps its shapes and takes each option as a list of one.

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

__all__ = ["batched", "triton_graphs"]

INT = ir.DataType.INT64
# What a request says of `generate`; the rest is the artifact's rule, or is left out.
OPTIONS = ("num_candidates", "max_new_tokens", "temperature", "top_k", "top_p", "seed")


def batched(name: str) -> bool:
    """Whether Triton may join requests for a graph."""
    return name != "generate"


def triton_graphs(artifact: Path, manifest: Manifest) -> Iterator[tuple[str, ir.Model]]:
    """Each graph's name and model; the weights stay where they are, in the file that the artifact's graphs share.

    `generate` is left out where the scoring rule is told by the caller, who cannot see the steps before they exist.
    """
    for name, wrap in _WRAPPERS.items():
        if name not in manifest.graphs or (name == "generate" and not _generates(manifest.scoring)):
            continue
        model = ir.load(locate(artifact, manifest.graphs[name].file))
        wrap(_Borders(model.graph), manifest.scoring)
        made = finish(model.graph, (), model.graph.opset_imports[""])
        RemoveUnusedNodesPass()(made)
        yield name, made


class _Borders:
    """A graph whose inputs and outputs are exchanged, one by one."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.before, self.after = Builder("triton/before"), Builder("triton/after")
        self._old = {str(value.name): value for value in graph.inputs}
        self._results = {str(value.name): value for value in graph.outputs}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def take(self, name: str, shape: Sequence[int | str], change: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """An input of another shape; `change` makes of it what the graph reads."""
        old = self._old[name]
        assert old.dtype is not None
        new = ir.val(name, old.dtype, shape)
        self._inputs.append(new)
        self.fix(name, change(new))
        return new

    def keep(self, name: str, shape: Sequence[int | str]) -> ir.Value:
        """An input as it is, its axes named anew."""
        value = self._old.pop(name)
        value.shape = ir.Shape(shape)
        self._inputs.append(value)
        return value

    def fix(self, name: str, value: ir.Value | NDArray[np.generic]) -> None:
        """What the graph reads in place of an input."""
        made = value if isinstance(value, ir.Value) else self.before.constant(value)
        self._old.pop(name).replace_all_uses_with(made)

    def result(self, name: str) -> ir.Value:
        """What the graph gives as an output; its name is free for another value."""
        value = self._results.pop(name)
        value.name = f"triton/{name}"
        return value

    def give(self, name: str, value: ir.Value, like: ir.Value, shape: Sequence[int | str]) -> None:
        """An output, of the type of another value."""
        assert like.dtype is not None
        self._outputs.append(name_value(value, name, like.dtype, shape))

    def close(self) -> None:
        """Put everything into the graph; what is neither taken nor fixed, or not given, is gone."""
        assert not self._old, f"nothing feeds {', '.join(self._old)}"
        for values, now in ((self.graph.inputs, self._inputs), (self.graph.outputs, self._outputs)):
            values.clear()
            values.extend(now)
        for builder in (self.before, self.after):
            for value in builder.initializers:
                self.graph.register_initializer(value)
        self.graph.insert_before(self.graph[0], self.before.nodes)
        self.graph.extend(self.after.nodes)


def _rank(borders: _Borders, scoring: Scoring) -> None:
    """Prompts (B, P), candidates (B, N, T) -> scores (B, N, T), candidate_scores (B, N), best_index (B, 1)."""
    graph, before, after = borders.graph, borders.before, borders.after
    prompt, prompt_mask, candidate, candidate_mask = (str(value.name) for value in graph.inputs[:4])
    width = _width(graph.inputs[0], 2)
    table = ["batch", "num_candidates", "length"]
    borders.keep(prompt, ["batch", "prompt_length", *width])
    borders.keep(prompt_mask, ["batch", "prompt_length"])
    swap = [1, 0, 2, 3]
    ids = borders.take(candidate, [*table, *width], lambda x: before.Transpose(x, perm=swap[: 3 + len(width)]))
    borders.take(candidate_mask, table, lambda x: before.Transpose(x, perm=swap[:3]))
    _fix_rule(borders, scoring, None if width else ids, table, lambda x: before.Transpose(x, perm=swap[:3]))
    for name, axes in (("scores", table), ("candidate_scores", table[:2])):
        value = borders.result(name)
        borders.give(name, after.Transpose(value, perm=swap[: len(axes)]), value, axes)
    best = borders.result("best_index")
    borders.give("best_index", after.Unsqueeze(best, after.ints(1)), best, ["batch", 1])
    borders.close()


def _score(borders: _Borders, scoring: Scoring) -> None:
    """Rows (B, T) -> scores (B, T, 1), row_scores (B, 1), backbone (B, T, D): rows stand alone, none is chosen."""
    graph, before = borders.graph, borders.before
    rows, mask = (str(value.name) for value in graph.inputs[:2])
    width = _width(graph.inputs[0], 2)
    axes = ["batch", "sequence"]
    values = borders.keep(rows, [*axes, *width])
    borders.keep(mask, axes)
    # As candidates of one prompt: their scores are (B, 1) then.
    borders.fix("num_candidates", before.Squeeze(before.Shape(values, start=0, end=1), before.ints(0)))
    _fix_rule(borders, scoring, None if width else values, axes, lambda x: before.Unsqueeze(x, before.ints(1)))
    outputs: dict[str, tuple[str, list[int | str]]] = {
        "scores": ("scores", [*axes, 1]),
        "candidate_scores": ("row_scores", ["batch", 1]),
        "backbone": ("backbone", [*axes, *_width(graph.outputs[0], 2)]),
    }
    for name, (given, shape) in outputs.items():
        value = borders.result(name)
        borders.give(given, value, value, shape)
    borders.close()


def _generate(borders: _Borders, scoring: Scoring) -> None:
    """The graph's own shapes; each option, and each scalar that comes out, is a list of one."""
    graph, before, after = borders.graph, borders.before, borders.after
    for name in ("input_ids", "attention_mask"):
        borders.keep(name, ["batch", "prompt_length"])
    for name in OPTIONS:
        borders.take(name, [1], lambda x: before.Squeeze(x, before.ints(0)))
    step_token = scoring.step_token if is_stepwise(scoring.aggregation) else None
    stops = [token for token in (scoring.end_token, *scoring.stop_tokens) if token is not None]
    borders.fix("stop_tokens", np.array(stops, np.int64))
    borders.fix("aggregation", np.array(aggregation_code(scoring.aggregation), np.int64))
    borders.fix("step_token", np.array(-1 if step_token is None else step_token, np.int64))
    borders.fix("prune_every", np.array(0, np.int64))
    borders.fix("prune_keep", np.array(1, np.float32))
    for output in [*graph.outputs]:
        assert output.shape is not None
        name, shape = str(output.name), [axis if isinstance(axis, int) else str(axis.value) for axis in output.shape]
        value = borders.result(name)
        if shape:
            borders.give(name, value, value, shape)
        else:
            borders.give(name, after.Unsqueeze(value, after.ints(0)), value, [1])
    borders.close()


_WRAPPERS: dict[str, Callable[[_Borders, Scoring], None]] = {"rank": _rank, "score": _score, "generate": _generate}


def _fix_rule(
    borders: _Borders,
    scoring: Scoring,
    ids: ir.Value | None,
    shape: Sequence[str],
    turn: Callable[[ir.Value], ir.Value],
) -> None:
    """The artifact's scoring rule: which positions are read, and how; as `Model` does it for token ids, without a vote.

    Args:
        borders: they lose `aggregation`, `answer_ids` and `vote`, and `step_mask` unless the caller must give it.
        scoring: the rule.
        ids: of a request, shaped as its mask; None for embeddings.
        shape: of that mask.
        turn: gives what is shaped so the shape that the graph reads.
    """
    before, name = borders.before, scoring.aggregation
    borders.fix("aggregation", np.array(aggregation_code(name), np.int64))
    borders.fix("answer_ids", np.full((1, 1), -1, np.int64))
    borders.fix("vote", np.array(0, np.int64))
    if is_stepwise(name) and (ids is None or scoring.step_token is None):
        borders.take("step_mask", shape, turn)
    elif is_stepwise(name):
        borders.fix("step_mask", turn(before.Cast(before.Equal(ids, before.int(scoring.step_token or 0)), to=INT)))
    elif name == "last" and scoring.passes_pad and ids is not None:
        padding = before.Equal(ids, before.int(scoring.pad_token))
        borders.fix("step_mask", turn(before.Cast(before.Not(padding), to=INT)))
    else:
        borders.fix("step_mask", np.ones((1, 1, 1), np.int64))


def _generates(scoring: Scoring) -> bool:
    return not is_stepwise(scoring.aggregation) or scoring.step_token is not None


def _width(value: ir.Value, axes: int) -> list[int]:
    """The fixed axes behind the first ones."""
    assert value.shape is not None
    return [axis for axis in value.shape[axes:] if isinstance(axis, int)]

"""A model repository for NVIDIA's Triton Inference Server, from an artifact: `bonnx export --triton DIR`.

Triton joins requests along the first axis of every tensor and knows no scalars. Our graphs have candidates first, and
scalars for what is chosen at a call. So each graph is written once more with requests first, and what is chosen at a
call fixed as the artifact's own rule; `generate` keeps its scalars, as lists of one, and is not batched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..runtime.errors import ExportError
from ..runtime.folder import locate, read_verified
from ..runtime.inputs import aggregation_code, is_stepwise
from ..runtime.manifest import Manifest
from ..runtime.session import WEIGHTS
from .artifact import staged
from .builder import Builder, name_value

__all__ = ["check_repository", "write_repository"]

INT, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
_TYPES = {INT: "TYPE_INT64", FLOAT: "TYPE_FP32"}
_MAX_BATCH = 32
_QUEUE_MICROSECONDS = 1000


def check_repository(repository: Path, *, overwrite: bool) -> None:
    """Refuse a repository before any work is done.

    Raises:
        ExportError: it exists and may not be replaced, or replacing it would delete what is no repository.
    """
    if not repository.exists():
        return
    if not overwrite:
        raise ExportError(f"{repository} exists; choose another folder, or pass --overwrite to replace it")
    if not repository.is_dir() or any(not (path / "config.pbtxt").is_file() for path in repository.iterdir()):
        raise ExportError(f"{repository} is not a model repository, so --overwrite does not replace it")


def write_repository(artifact: Path, repository: Path, *, overwrite: bool = False) -> list[str]:
    """Write the models `NAME_rank`, `NAME_score` and, of a language model, `NAME_generate`.

    Args:
        artifact: its folder.
        repository: the folder to write, whole or not at all.
        overwrite: replace a repository that is there.

    Returns:
        the models' names.

    Raises:
        ArtifactError: not an artifact, or not as it was written.
        ExportError: the repository cannot be written.
    """
    check_repository(repository, overwrite=overwrite)
    manifest = read_verified(artifact)
    names: list[str] = []
    with staged(repository) as staging:
        for graph, wrap in _WRAPS.items():
            if graph not in manifest.graphs:
                continue
            name = f"{manifest.name}_{graph}"
            version = staging / name / "1"
            version.mkdir(parents=True)
            source = locate(artifact, manifest.graphs[graph].file)
            model = ir.load(source)
            wrap(model.graph, manifest)
            RemoveUnusedNodesPass()(model)
            (version / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
            _link(source.with_name(WEIGHTS), version / WEIGHTS, [staging / other / "1" / WEIGHTS for other in names])
            (staging / name / "config.pbtxt").write_text(_config(name, model.graph, batched=graph != "generate"))
            names.append(name)
    return names


def _link(source: Path, target: Path, copies: Sequence[Path]) -> None:
    """The weights once for all models of a repository, where the file system can."""
    if not source.is_file():
        return
    if copies:
        try:
            os.link(copies[0], target)
        except OSError:
            shutil.copyfile(source, target)
    else:
        shutil.copyfile(source, target)


class _Border:
    """Changes what a graph takes and gives, and nothing between."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.first, self.last = graph, Builder("first"), Builder("last")

    def take(self, name: str, shape: Sequence[int | str], change: Callable[[Any], Any] | None = None) -> ir.Value:
        """Take an input of another shape, and change it into the one that the graph reads; what it then is."""
        old = self._input(name)
        assert old.dtype is not None
        new = ir.val(name, old.dtype, shape)
        changed: ir.Value = new if change is None else change(new)
        old.replace_all_uses_with(changed)
        self.graph.inputs[list(self.graph.inputs).index(old)] = new
        return changed

    def fix(self, name: str, value: ir.Value) -> None:
        """Take an input no more: it is this value."""
        old = self._input(name)
        old.replace_all_uses_with(value)
        self.graph.inputs.remove(old)

    def give(self, outputs: dict[str, tuple[str, Sequence[int | str], Callable[[Any], Any] | None]]) -> None:
        """Give these outputs only: for each name that of the graph's own, its new shape, and how it changes."""
        own = {str(value.name): value for value in self.graph.outputs}
        found = []
        for name, (source, shape, change) in outputs.items():
            value, dtype = own[source], own[source].dtype
            assert dtype is not None
            if change is not None:
                value.name = f"{source}/inside"
                value = change(value)
            found.append(name_value(value, name, dtype, shape))
        self.graph.outputs[:] = found

    def close(self) -> None:
        """Put the new nodes in their places."""
        for builder in (self.first, self.last):
            for value in builder.initializers:
                self.graph.register_initializer(value)
        for place, builder in ((0, self.first), (None, self.last)):
            for i, node in enumerate(builder.nodes):
                node.name = f"{builder.name}/{i}"
                for output in node.outputs:
                    output.name = output.name or f"{builder.name}/value{i}"
            if place == 0:
                self.graph.insert_before(self.graph[0], builder.nodes)
            else:
                self.graph.extend(builder.nodes)

    def _input(self, name: str) -> ir.Value:
        return next(value for value in self.graph.inputs if value.name == name)


def _rank(graph: ir.Graph, manifest: Manifest) -> None:
    border = _Border(graph)
    first, last = border.first, border.last
    kind, more = _kind(manifest)
    border.take(f"prompt_{kind}", ["batch", "prompt_length", *more])
    border.take("prompt_mask", ["batch", "prompt_length"])
    swap = [1, 0, 2] if not more else [1, 0, 2, 3]
    shape = ["batch", "num_candidates", "length"]
    values = border.take(f"candidate_{kind}", [*shape, *more], lambda value: first.Transpose(value, perm=swap))
    border.take("candidate_mask", shape, lambda value: first.Transpose(value, perm=[1, 0, 2]))
    _fix_selection(border, manifest, values, shape, lambda value: first.Transpose(value, perm=[1, 0, 2]))
    border.give({
        "scores": ("scores", shape, lambda value: last.Transpose(value, perm=[1, 0, 2])),
        "candidate_scores": ("candidate_scores", shape[:2], lambda value: last.Transpose(value, perm=[1, 0])),
        "best_index": ("best_index", ["batch", 1], lambda value: last.Unsqueeze(value, last.ints(1))),
    })  # fmt: skip
    border.close()


def _score(graph: ir.Graph, manifest: Manifest) -> None:
    """Rows that stand alone: there is nothing to choose between the rows of several requests."""
    border = _Border(graph)
    first, last = border.first, border.last
    kind, more = _kind(manifest)
    shape = ["batch", "sequence"]
    values = border.take("input_ids" if kind == "ids" else "inputs_embeds", [*shape, *more])
    border.take("attention_mask", shape)
    border.fix("num_candidates", first.int(1))
    rows = first.Unsqueeze(values, first.ints(0)) if kind == "ids" else values
    _fix_selection(border, manifest, rows, shape, lambda value: first.Unsqueeze(value, first.ints(0)))
    hidden = int(manifest.network["hidden_size"])
    border.give({
        "scores": ("scores", [*shape, 1], None),
        "row_scores": ("candidate_scores", ["batch", 1], lambda value: last.Transpose(value, perm=[1, 0])),
        "backbone": ("backbone", [*shape, hidden], None),
    })  # fmt: skip
    border.close()


def _generate(graph: ir.Graph, manifest: Manifest) -> None:
    """Every scalar becomes a list of one."""
    border = _Border(graph)
    first = border.first
    for value in [value for value in graph.inputs if value.shape is not None and not len(value.shape)]:
        border.take(str(value.name), [1], lambda new: first.Squeeze(new, first.ints(0)))
    names = [value for value in graph.outputs if value.shape is not None and len(value.shape)]
    border.give({str(v.name): (str(v.name), [_axis(axis) for axis in v.shape or ()], None) for v in names})
    border.close()


_WRAPS: dict[str, Callable[[ir.Graph, Manifest], None]] = {"rank": _rank, "score": _score, "generate": _generate}


def _kind(manifest: Manifest) -> tuple[str, list[int | str]]:
    """Suffix of the inputs, and the axes behind the tokens'."""
    return ("ids", []) if manifest.kind == "language_model" else ("embeds", [int(manifest.network["embed_dim"])])


def _fix_selection(
    border: _Border, manifest: Manifest, ids: ir.Value, shape: list[str], turn: Callable[[Any], Any]
) -> None:
    """The artifact's own rule; `ids` are laid out as the graph has them, `turn` does that to an input of this shape."""
    first, scoring = border.first, manifest.scoring
    border.fix("aggregation", first.int(aggregation_code(scoring.aggregation)))
    border.fix("vote", first.int(0))
    border.fix("answer_ids", first.constant(np.full((1, 1), -1, np.int64)))
    tokens = manifest.kind == "language_model"
    if is_stepwise(scoring.aggregation) and (scoring.step_token is None or not tokens):
        border.take("step_mask", shape, turn)
    elif is_stepwise(scoring.aggregation):
        assert scoring.step_token is not None
        border.fix("step_mask", first.Cast(first.Equal(ids, first.int(scoring.step_token)), to=INT))
    elif scoring.aggregation == "last" and scoring.passes_pad and tokens:
        border.fix("step_mask", first.Cast(first.Not(first.Equal(ids, first.int(scoring.pad_token))), to=INT))
    else:
        border.fix("step_mask", first.constant(np.ones((1, 1, 1), np.int64)))


def _axis(axis: Any) -> int | str:
    return axis if isinstance(axis, int) else str(axis.value)


def _config(name: str, graph: ir.Graph, *, batched: bool) -> str:
    """`config.pbtxt`: axes of any length are -1, the first is Triton's own if requests are joined."""
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', f"max_batch_size: {_MAX_BATCH if batched else 0}"]
    for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
        for value in values:
            assert value.dtype is not None
            axes = [_axis(axis) for axis in value.shape or ()][int(batched) :]
            dims = ", ".join(str(axis) if isinstance(axis, int) else "-1" for axis in axes)
            lines.append(f'{kind} [ {{ name: "{value.name}" data_type: {_TYPES[value.dtype]} dims: [ {dims} ] }} ]')
    if batched:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {_QUEUE_MICROSECONDS} }}")
    lines.append("instance_group [ { kind: KIND_AUTO count: 1 } ]")
    return "\n".join(lines) + "\n"

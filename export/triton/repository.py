"""`bonnx export --triton DIR`: write an artifact as a model repository for Triton, completely or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx_ir as ir

from bonnx.errors import ExportError
from bonnx.runtime.artifact.folder import WEIGHTS, read_verified

from ..staging import staged
from ..verify.parity import check_structure
from .graphs import triton_graphs

__all__ = ["check_repository", "write_repository"]

CONFIG, GRAPH = "config.pbtxt", "model.onnx"
# The first line of each config, by which a repository that may be replaced is recognized.
_MARK = "# Written by bonnx export --triton."
_MAX_BATCH_SIZE, _MAX_QUEUE_DELAY = 32, 2000
_TYPES = {ir.DataType.INT64: "TYPE_INT64", ir.DataType.FLOAT: "TYPE_FP32"}


def write_repository(artifact: Path, repository: Path, *, overwrite: bool = False) -> list[str]:
    """Write an artifact's `rank`, `score` and, for a language model, `generate` graphs as Triton models.

    Args:
        artifact: the artifact's folder; every file's hash is checked.
        repository: the folder to write; it must not exist, unless `overwrite`.
        overwrite: replace a repository that this function wrote.

    Returns:
        The models' names, each a folder of the repository.

    Raises:
        ArtifactError: if the artifact has changed since it was written.
        ExportError: if the folder exists, the disk is full, a graph is not valid ONNX, or the artifact is older than
            options for each prompt; nothing is left behind.
    """
    manifest = read_verified(artifact)
    if "generate" in manifest.graphs and not manifest.graphs["generate"].per_prompt:
        raise ExportError(f"{artifact}: its 'generate' takes one value of each option for all prompts; export it again")
    check_repository(repository, artifact, overwrite=overwrite)
    names: list[str] = []
    with staged(repository.absolute()) as folder:
        weights = folder / WEIGHTS
        shutil.copyfile(artifact / "onnx" / WEIGHTS, weights)
        for graph, model in triton_graphs(artifact, manifest):
            name = f"{manifest.slug}_{graph}"
            version = folder / name / "1"
            version.mkdir(parents=True)
            # Each version gets the file in turn, because `onnx.checker` refuses a file with several hard links.
            weights = weights.rename(version / WEIGHTS)
            (version / GRAPH).write_bytes(ir.to_proto(model).SerializeToString())
            check_structure(version / GRAPH)
            (folder / name / CONFIG).write_text(_config(name, model.graph), encoding="utf-8")
            names.append(name)
        for name in names[:-1]:
            _link(weights, folder / name / "1" / WEIGHTS)
    return names


def check_repository(repository: Path, artifact: Path, *, overwrite: bool) -> None:
    """Refuse an unsuitable folder for a repository before any work is done.

    Raises:
        ExportError: if it or the artifact's folder contains the other, it exists without `overwrite`, or replacing it
            would delete files that export did not write.
    """
    ours, theirs = repository.resolve(), artifact.resolve()
    if ours.is_relative_to(theirs) or theirs.is_relative_to(ours):
        raise ExportError(
            f"{repository} and the artifact's folder {artifact}: one contains the other; choose another folder"
        )
    if not repository.exists():
        return
    if not overwrite:
        raise ExportError(f"{repository} exists; choose another folder, or pass --overwrite to replace it")
    foreign = [repository] if not repository.is_dir() else [p for p in repository.iterdir() if not _is_ours(p)]
    if foreign:
        raise ExportError(
            f"{foreign[0]} was not written by `bonnx export --triton`, so --overwrite does not delete it; "
            "choose another folder"
        )


def _is_ours(model: Path) -> bool:
    config = model / CONFIG
    return config.is_file() and config.read_bytes().startswith(_MARK.encode())


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _config(name: str, graph: ir.Graph) -> str:
    """Return the content of `config.pbtxt`, as defined by `ModelConfig` in Triton's model_config.proto."""
    lines = [
        f"{_MARK} To tune it, see docs/triton.md.",
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f'default_model_filename: "{GRAPH}"',
        f"max_batch_size: {_MAX_BATCH_SIZE}",
        *(_tensor("input", value) for value in graph.inputs),
        *(_tensor("output", value) for value in graph.outputs),
        "instance_group [ { kind: KIND_AUTO, count: 1 } ]",
        f"dynamic_batching {{ max_queue_delay_microseconds: {_MAX_QUEUE_DELAY} }}",
    ]
    return "\n".join(lines) + "\n"


def _tensor(kind: str, value: ir.Value) -> str:
    """Return an entry for a tensor; the request axis is implicit."""
    assert value.shape is not None
    assert value.dtype is not None
    dims = ", ".join(str(axis) if isinstance(axis, int) else "-1" for axis in value.shape[1:])
    return f'{kind} [ {{ name: "{value.name}", data_type: {_TYPES[value.dtype]}, dims: [ {dims} ] }} ]'

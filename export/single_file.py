"""An artifact of one graph with its weights inside: one `.onnx` file for a device or a page.

Weights in a file of their own are stored once for all graphs. Inside the graphs, each would hold them again, so a
single file is one graph: the one that goes from a prompt to the winner in one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import onnx
from onnx.external_data_helper import uses_external_data

from bonnx.errors import ExportError
from bonnx.runtime.artifact.folder import WEIGHTS
from bonnx.runtime.artifact.manifest import Graph
from bonnx.runtime.verification import GOLDEN

__all__ = ["SINGLE_FILES", "SingleFile", "check_size", "choose_graph", "keep_one"]

SingleFile: TypeAlias = Literal["generate", "rank"]
SINGLE_FILES: tuple[SingleFile, ...] = ("generate", "rank")
# The largest message of protobuf, in bytes.
_LARGEST = 2**31 - 1


def choose_graph(graphs: Mapping[str, Graph], wanted: SingleFile | None) -> str:
    """The graph that is kept: the wanted one, or by default `generate` of a language model and `rank` of others.

    Raises:
        ExportError: the model has no such graph.
    """
    name: str = wanted or next(name for name in SINGLE_FILES if name in graphs)
    if name not in graphs:
        raise ExportError(
            f"--single-file {name}: this model has no such graph, only {', '.join(graphs)}; choose another one, or "
            "leave it out"
        )
    return name


def check_size(folder: Path, graph: Graph) -> None:
    """Refuse a graph that is too large with its weights inside.

    Raises:
        ExportError: more than protobuf takes.
    """
    path = folder / graph.file
    size = path.stat().st_size
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if uses_external_data(tensor):
            size += next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
    if size > _LARGEST:
        raise ExportError(
            f"--single-file: {path.name} would have {size:,} bytes with its weights, and protobuf takes at most "
            f"{_LARGEST:,}; export with --precision int8 or int4, or without --single-file"
        )


def keep_one(folder: Path, graphs: Mapping[str, Graph], name: str) -> dict[str, Graph]:
    """Put the weights of one graph into its file, and remove the other graphs and what was recorded of them.

    Args:
        folder: of the artifact.
        graphs: all graphs by name.
        name: the graph to keep.

    Returns:
        The manifest's entry of that graph, by its name.
    """
    path = folder / graphs[name].file
    # onnx.load reads the weights, too.
    path.write_bytes(onnx.load(path).SerializeToString())
    for other, graph in graphs.items():
        if other != name:
            (folder / graph.file).unlink()
    path.with_name(WEIGHTS).unlink()
    with np.load(folder / GOLDEN) as recorded:
        kept = {key: recorded[key] for key in recorded.files if key.startswith(f"{name}/")}
    if kept:
        np.savez_compressed(folder / GOLDEN, **kept)
    else:
        # At int8 there may be no case of `generate` that every machine computes alike.
        (folder / GOLDEN).unlink()
    return {name: graphs[name]}

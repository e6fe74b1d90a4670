"""Graphs as ONNX Runtime optimized them for this processor, kept on disk with the weights as its kernels read them.

Without this, every session packs weights of its own, in memory of its own. A packed weight that is in a file is mapped
instead, so the sessions of all graphs, and all processes of a machine, share its memory.

The folder holds one folder for each kind of processor and version of ONNX Runtime; in it are a `.json` and an `.onnx`
file for each graph, and `weights/`, a file for each weight with its packed forms, named by its sha256. Whatever is
missing or damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from bonnx.errors import InputError

from ..artifact.folder import file_digest

__all__ = ["GraphCache", "processor"]

# Of the files in the cache, not of the artifact.
_VERSION = 1
# Packed weights begin at multiples of it, so that each is mapped by itself.
_PAGE = 4096
_WEIGHTS = "weights"
_PACKED = "prepacked_"


class GraphCache:
    """Optimized graphs in a folder.

    Args:
        folder: is made if it does not exist.
        runtime: version of ONNX Runtime.
        settings: whatever else decides how weights are packed.
    """

    def __init__(self, folder: Path, runtime: str, settings: str) -> None:
        self.folder = folder
        kind = json.dumps([_VERSION, runtime, settings, processor()])
        self._place = folder / hashlib.sha256(kind.encode()).hexdigest()[:32]

    def graph(self, key: str, optimize: Callable[[Path, str], object]) -> Path:
        """The optimized graph of a key.

        Args:
            key: identifies the graph and its weights, for a file name.
            optimize: is called if the cache has no such graph: it writes the optimized graph to a path, and the weights
                to a file of the given name beside it.

        Raises:
            InputError: the folder cannot be written to.
        """
        path = self._place / f"{key}.onnx"
        if not self._is_intact(path):
            try:
                self._make(path, optimize)
            except OSError as e:
                raise InputError(
                    f"cache_dir: cannot write to {self.folder} ({e.strerror or e}); free some space, choose another "
                    "folder, or load without it"
                ) from e
        return path

    def _is_intact(self, path: Path) -> bool:
        """Whether a graph and all of its weights are there, each with the sha256 that it was written with."""
        try:
            entry = json.loads(path.with_suffix(".json").read_bytes())
            names = [str(name) for name in entry["weights"]]
            return file_digest(path) == entry["graph"] and all(
                file_digest(self._place / _WEIGHTS / name) == name for name in names
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _make(self, path: Path, optimize: Callable[[Path, str], object]) -> None:
        weights = self._place / _WEIGHTS
        weights.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=self._place, prefix=".unfinished-"))
        try:
            optimize(scratch / "graph.onnx", "weights.bin")
            model = _model_class()()
            model.ParseFromString((scratch / "graph.onnx").read_bytes())
            names = set()
            # A graph without large weights has no such file.
            (scratch / "weights.bin").touch()
            with (scratch / "weights.bin").open("rb") as file:
                for tensor in _tensors(model.graph):
                    if tensor.external_data:
                        data = _moved(tensor, file)
                        name = hashlib.sha256(data).hexdigest()
                        _set(tensor, "location", f"{_WEIGHTS}/{name}")
                        # An intact file stays, since it may be mapped.
                        if not (weights / name).exists() or file_digest(weights / name) != name:
                            (scratch / "part").write_bytes(data)
                            (scratch / "part").replace(weights / name)
                        names.add(name)
            (scratch / "moved.onnx").write_bytes(model.SerializeToString())
            entry = {"graph": file_digest(scratch / "moved.onnx"), "weights": sorted(names)}
            (scratch / "entry.json").write_text(json.dumps(entry), encoding="utf-8")
            # The entry comes last: a graph without one is made again.
            (scratch / "moved.onnx").replace(path)
            (scratch / "entry.json").replace(path.with_suffix(".json"))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _moved(tensor: Any, file: Any) -> bytes:
    """The bytes of a tensor and its packed forms, whose offsets it then gives relative to them."""
    entries = {entry.key: entry.value for entry in tensor.external_data}

    def read(offset: str, length: str) -> bytes:
        file.seek(int(offset))
        data: bytes = file.read(int(length))
        return data

    whole = read(entries.get("offset", "0"), entries["length"])
    _set(tensor, "offset", "0")

    def place(match: re.Match[str]) -> str:
        nonlocal whole
        whole += b"\0" * (-len(whole) % _PAGE)
        begin = len(whole)
        whole += read(match[1], match[2])
        return f"{begin};{match[2]};"

    for key in sorted(key for key in entries if key.startswith(_PACKED)):
        # The kernel's name and a hash, then for each of its buffers offset;length;checksum.
        kernel, bar, buffers = entries[key].partition("|")
        _set(tensor, key, kernel + bar + re.sub(r"(\d+);(\d+);", place, buffers))
    return whole


def _set(tensor: Any, key: str, value: str) -> None:
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value


def _tensors(graph: Any) -> Iterator[Any]:
    """The initializers of a graph and of the graphs in it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


@cache
def _model_class() -> Any:
    """ONNX's `ModelProto` with the fields that lead to external data; protobuf keeps the others as they are."""
    # ONNX Runtime requires protobuf, but not onnx.
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="bonnx/external_data.proto", package="bonnx", syntax="proto2")
    messages: dict[str, list[tuple[str, int, str, bool]]] = {
        "Model": [("graph", 7, "Graph", False)],
        "Graph": [("node", 1, "Node", True), ("initializer", 5, "Tensor", True)],
        "Node": [("attribute", 5, "Attribute", True)],
        "Attribute": [("g", 6, "Graph", False), ("graphs", 11, "Graph", True)],
        "Tensor": [("external_data", 13, "Entry", True)],
        "Entry": [("key", 1, "", False), ("value", 2, "", False)],
    }
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for label, number, kind, repeated in fields:
            message.field.add(
                name=label,
                number=number,
                label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL,
                type=field.TYPE_MESSAGE if kind else field.TYPE_STRING,
                type_name=f".bonnx.{kind}" if kind else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("bonnx.Model"))


@cache
def processor() -> list[str]:
    """What tells processors apart whose kernels differ: the architecture, the name, and on Linux the features."""
    told = [platform.machine(), platform.processor()]
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return told
    lines = dict(line.split(":", 1) for line in text.partition("\n\n")[0].splitlines() if ":" in line)
    named = {key.strip(): " ".join(sorted(value.split())) for key, value in lines.items()}
    return [*told, *(named.get(key, "") for key in ("model name", "flags", "Features", "CPU part"))]

"""Where ONNX Runtime runs the nodes of a graph on CUDA, and what it copies, by the log of a session. Nothing is run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bonnx.errors import ProviderError

from ..artifact.folder import locate, read_manifest

__all__ = ["CAPTURED", "CPU_ONLY", "Placement", "place", "place_artifact", "read_log"]

# Graphs that ONNX Runtime captures in CUDA graphs, and those that run on the CPU, wherever the others do.
CAPTURED, CPU_ONLY = frozenset({"decode_static"}), frozenset({"uniforms"})

# In a process of its own: ONNX Runtime logs to the standard error of the process, not of Python.
_LOAD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from bonnx.runtime.engine.providers import runtime_module
runtime = runtime_module()
if hasattr(runtime, "preload_dlls"):
    runtime.preload_dlls()
options = runtime.SessionOptions()
options.log_severity_level = 0
cuda = {"device_id": int(sys.argv[3]), "enable_cuda_graph": int(sys.argv[4])}
session = runtime.InferenceSession(
    sys.argv[2], options, providers=[("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
)
print(json.dumps([runtime.get_available_providers(), session.get_providers(), session.get_modelmeta().graph_name]))
"""
_PLACED = re.compile(r"odes?(?:\(s\))? placed on \[(\w+)\]")
_NODE = re.compile(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\S+) \((.*)\)$")


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a graph run, those in the bodies of loops and branches included.

    Attributes:
        cuda: nodes on CUDA.
        host: nodes on the CPU by design: they compute shapes.
        without: nodes on the CPU because ONNX Runtime has no CUDA kernel for them, by operator.
        copies: between host and device in a run of the graph.
        body_copies: further ones in the bodies of loops and branches, for one run of each.
    """

    cuda: int
    host: int
    without: dict[str, int]
    copies: int
    body_copies: int


def place_artifact(folder: Path) -> dict[str, Placement]:
    """Where the nodes of an artifact's graphs run, by the names of the graphs that run on CUDA.

    Raises:
        ArtifactError: the folder is not an artifact.
        ProviderError: the CUDA provider cannot be used.
    """
    return {
        name: place(locate(folder, graph.file), captured=name in CAPTURED)
        for name, graph in read_manifest(folder).graphs.items()
        if name not in CPU_ONLY
    }


def place(path: Path, device_id: int = 0, *, captured: bool = False) -> Placement:
    """Load a graph on CUDA and read where its nodes are.

    Args:
        path: of its file.
        device_id: of the GPU.
        captured: load it as one that is captured in a CUDA graph.

    Raises:
        ProviderError: the CUDA provider cannot be used, or the graph not be captured; the message has ONNX Runtime's
            reason.
    """
    command = [sys.executable, "-c", _LOAD, json.dumps(sys.path), str(path), str(device_id), str(int(captured))]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    log = re.sub(r"\x1b\[[\d;]*m", "", done.stderr)
    if done.returncode:
        lines = log.strip().splitlines()
        raise ProviderError(f"{path}: ONNX Runtime cannot load it: {lines[-1] if lines else done.returncode}")
    available, providers, graph = json.loads(done.stdout.splitlines()[-1])
    if "CUDAExecutionProvider" not in available:
        raise ProviderError(
            f"{path}: where its nodes run on CUDA needs onnxruntime-gpu; this ONNX Runtime has "
            f"{', '.join(available)} only"
        )
    if providers[0] != "CUDAExecutionProvider":
        errors = re.findall(r"\[E:.*?\] (.*)", log)
        reason = errors[0].rpartition("with error: ")[2] if errors else "it gives no reason"
        raise ProviderError(f"{path}: ONNX Runtime does not use CUDA for it: {reason.strip()}")
    return read_log(log, graph)


def read_log(log: str, graph: str) -> Placement:
    """Read a session's log of all severities; `graph` is the name that the outermost graph has in the file."""
    lacking = set(re.findall(r"kernel not found in registries for Op type: \S+ node name: (\S*)", log))
    nodes: dict[str, list[tuple[str, str]]] = {}
    provider = ""
    for line in log.splitlines():
        if match := _PLACED.search(line):
            provider = match[1]
        elif match := _NODE.search(line):
            nodes.setdefault(provider, []).append((match[1], match[2]))
    on_host = nodes.get("CPUExecutionProvider", [])
    # ONNX Runtime says of every other one that it forces it to the CPU; nodes that it fused there have new names.
    forced = set(re.findall(r"Force fallback to CPU execution for node: (\S*) because", log)) - lacking
    without = Counter(operator for operator, name in on_host if name not in forced)
    copies = Counter[bool]()
    for number, name in re.findall(r"(\d+) Memcpy nodes are added to the graph (.*?) for CUDAExecutionProvider", log):
        copies[name == graph] += int(number)
    cuda = [operator for operator, _ in nodes.get("CUDAExecutionProvider", []) if not operator.startswith("Memcpy")]
    if not nodes:
        # Version 1.31 lists none if all are at one place.
        whole = re.findall(r"All nodes placed on \[CUDAExecutionProvider\]\. Number of nodes: (\d+)", log)
        cuda = ["any"] * sum(map(int, whole))
    return Placement(len(cuda), len(on_host) - without.total(), dict(without), copies[True], copies[False])

"""Where ONNX Runtime places nodes on CUDA, from the log of a session, written here as version 1.31 writes it."""

import re

import pytest

from bonnx import ProviderError
from bonnx.command.doctor import diagnose
from bonnx.runtime.artifact.folder import read_manifest
from bonnx.runtime.engine.placement import place_artifact, read_log

PREFIX = "\x1b[0;93m2026-11-27 10:54:44.5 [{}:onnxruntime:, {}] "
MODULE = """
import os, pathlib, types
__version__, cuda_version = "1.31.1", "13.0"
SessionOptions = types.SimpleNamespace
PROVIDERS = {providers!r}
def get_available_providers(): return ["CUDAExecutionProvider", "CPUExecutionProvider"]
class InferenceSession:
    def __init__(self, path, options, providers):
        assert options.log_severity_level == 0 and providers[0][0] == "CUDAExecutionProvider"
        assert pathlib.Path(path).exists()
        os.write(2, {log!r}.encode())
    def get_providers(self): return PROVIDERS
    def get_modelmeta(self): return types.SimpleNamespace(graph_name="whole")
"""


def _log(rng):
    """A log and what it says: random counts of nodes, of which those on the CPU are forced or have no kernel."""
    cuda, host, copies = (int(n) for n in rng.integers(1, 9, 3))
    without = {name: int(rng.integers(1, 5)) for name in ("BitShift", "Unique")}
    bodies = [int(n) for n in rng.integers(1, 5, rng.integers(0, 4))]
    lines, on_cpu = [], []
    lacking = [f"{operator} ({operator}_{i})" for operator, count in without.items() for i in range(count)]
    for node in lacking:
        operator, name = node[:-1].split(" (")
        text = f"CUDA kernel not found in registries for Op type: {operator} node name: {name}\n"
        # Once for each pass over the graph.
        lines += [PREFIX.format("I", "cuda_execution_provider.cc:3505 GetCapability") + text] * int(rng.integers(1, 3))
    for i in range(host):
        why = f"Force fallback to CPU execution for node: Concat_{i} because the CPU execution path is faster\n"
        lines.append(PREFIX.format("I", "fallback_cpu_capability.cc:167 GetCpuPreferredNodes") + why)
        on_cpu.append(f"Concat (Concat_{i})")
    for name, count in [("whole", copies), *(("rows", n) for n in bodies)]:
        text = (
            f"ApplyImpl] {count} Memcpy nodes are added to the graph {name} for CUDAExecutionProvider. It might ...\n"
        )
        lines.append(PREFIX.format("W", "transformer_memcpy.cc:111 ApplyImpl") + text)
    where = PREFIX.format("V", "session_state.cc:1584 VerifyEachNodeIsAssignedToAnEp").rstrip()
    placed = {"CPU": [*on_cpu, *lacking], "CUDA": [f"MatMul (MatMul_{i})" for i in range(cuda)]}
    placed["CUDA"] += [f"MemcpyToHost (Memcpy_{i})" for i in range(copies)]
    for short, nodes in placed.items():
        lines.append(f"{where}  Node(s) placed on [{short}ExecutionProvider]. Number of nodes: {len(nodes)}\n")
        lines += [f"{where}   {node}\n" for node in nodes]
    expected = {"cuda": cuda, "host": host, "without": without, "copies": copies, "body_copies": sum(bodies)}
    return "".join(lines), expected


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """Make an ONNX Runtime that logs this, with a session on these providers."""

    def make(log, providers=("CUDAExecutionProvider", "CPUExecutionProvider")):
        folder = tmp_path / "onnxruntime"
        folder.mkdir()
        (folder / "__init__.py").write_text(MODULE.format(providers=list(providers), log=log))
        monkeypatch.syspath_prepend(str(tmp_path))
        return folder

    return make


def test_counts_of_a_log(rng):
    log, expected = _log(rng)
    plain = re.sub(r"\x1b\[[\d;]*m", "", log)
    assert vars(read_log(plain, "whole")) == expected
    # All copies are in bodies if the graph has another name.
    both = expected["copies"] + expected["body_copies"]
    assert vars(read_log(plain, "main")) == {**expected, "copies": 0, "body_copies": both}


def test_a_graph_that_is_on_one_provider():
    log = "VerifyEachNodeIsAssignedToAnEp]  All nodes placed on [CUDAExecutionProvider]. Number of nodes: 3\n"
    assert vars(read_log(log, "x")) == {"cuda": 3, "host": 0, "without": {}, "copies": 0, "body_copies": 0}


def test_every_graph_of_an_artifact(tiny, runtime, rng):
    log, expected = _log(rng)
    runtime(log)
    placed = place_artifact(tiny)
    assert list(placed) == list(read_manifest(tiny).graphs)
    assert all(vars(placement) == expected for placement in placed.values())


def test_a_session_that_fell_back_to_the_cpu(tiny, runtime):
    runtime(
        "[E:onnxruntime:, x.cc:1 Get] Failed to load with error: libcublasLt.so.13: no such file",
        ["CPUExecutionProvider"],
    )
    with pytest.raises(ProviderError, match=r"does not use CUDA for it: libcublasLt\.so\.13: no such file"):
        place_artifact(tiny)


def test_a_runtime_for_the_cpu(tiny):
    with pytest.raises(
        ProviderError, match=r"needs onnxruntime-gpu; this ONNX Runtime has .*CPUExecutionProvider only"
    ):
        place_artifact(tiny)


def test_the_doctor_needs_a_runtime_for_cuda(tiny):
    (problem,) = [text for text in diagnose(tiny)["problems"] if str(tiny) in text]
    assert re.search(r"run on CUDA needs onnxruntime-gpu; this ONNX Runtime has .*CPUExecutionProvider only", problem)

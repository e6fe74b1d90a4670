"""Let ONNX Runtime capture and replay `decode_static` without a GPU: `python -m benchmarks.placement.replay ARTIFACT`.

For an artifact that was exported with `--cuda-graph`, where onnxruntime-gpu is installed. The host's loop runs on empty
CUDA libraries: every call that it makes for a GPU is made, and nothing is computed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import onnxruntime

from bonnx.runtime.engine import session
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.engine.fixed_run import FixedRun
from bonnx.runtime.generate.decoding import decode_all
from bonnx.runtime.generate.request import read_request

from .stubs import environment, make_stubs

# Tells the process that runs on the empty libraries.
INSIDE = "BONNX_REPLAY"


def replay(artifact: Path, counts: tuple[int, ...] = (1, 5, 16)) -> str:
    """Stream as many candidates each time, and say how often the graph ran, and for how many sizes."""
    runs, sizes, run = 0, set[tuple[int, ...]](), FixedRun.__call__

    def counted(fixed: FixedRun) -> None:
        nonlocal runs
        run(fixed)
        runs += 1
        sizes.add(tuple(fixed.sizes.values()))

    with mock.patch.object(session, "_has_device", return_value=True), mock.patch.object(FixedRun, "__call__", counted):
        engine = open_engine(artifact, provider="cuda")
        tokens = min(100, engine.manifest.limits.max_tokens - 1)
        for count in counts:
            request = read_request(engine, [0], {"n": count, "max_new_tokens": tokens, "stop": []})
            # Not `stream`, which would make text of what are no tokens.
            for _ in decode_all(engine, request.prompt, request.options, None, None):
                pass
    return f"onnxruntime-gpu {onnxruntime.__version__}: {runs} runs of decode_static, {len(sizes)} sizes captured"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    artifact = parser.parse_args().artifact
    if INSIDE in os.environ:
        print(replay(artifact))
        return 0
    wheel = Path(onnxruntime.__file__).parents[1]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        print("onnxruntime-gpu is not installed; nothing was captured", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        variables = environment(wheel, make_stubs(wheel, Path(folder)))
        path = os.pathsep.join(map(str, sys.path))
        variables = {**variables, "PYTHONPATH": path, INSIDE: "1"}
        return subprocess.run(sys.orig_argv, env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

"""Time other tools that sample N completions of one prompt: `python -m benchmarks.peers`.

    python -m benchmarks.peers install FOLDER    # a virtual environment for each library, under FOLDER/envs
    python -m benchmarks.peers prepare FOLDER    # a random checkpoint, converted for each library
    python -m benchmarks.peers run FOLDER --counts 1 4 16 64 --repeats 3
    python -m benchmarks.peers rank FOLDER --counts 16

The model is a Llama with hidden size 768, 12 layers, 12 heads, 4 kv heads, FFN 2048, vocabulary 32000 and tied
embeddings; prompt 512, exactly 64 new tokens in every completion, temperature 1, no top-k. Each peer in each mode is a
separate process (`peer_server.py`, whose classes document their modes), so that all can alternate within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from .rates import has_bfloat16, measure_rates, without_bfloat16
from .record import add_output, record
from .timing import interleave

HERE = Path(__file__).parent
TORCH = ["torch==2.13.0"]

# Requirements of each library's environment, then packages installed without their dependencies: optimum-intel requires
# torchvision, which a text model does not use and which has to match torch's build.
ENVIRONMENTS: dict[str, tuple[list[str], list[str]]] = {
    "transformers": ([*TORCH, "transformers==5.24.0", "numpy==2.4.6"], []),
    "openvino": (
        [*TORCH, "openvino-genai==2026.4.1.0", "nncf==3.4.0", "transformers==5.5.4", "requests==2.34.2"],
        ["optimum==2.3.0", "optimum-intel==2.2.0"],
    ),
    "llama": (["llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0"], []),
    "ctranslate2": ([*TORCH, "ctranslate2==4.8.5", "transformers==5.24.0"], []),
    "onnxruntime": (
        [*TORCH, "onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "transformers==5.24.0", "onnx-ir==1.1.0"],
        [],
    ),
}

# Name -> library (its environment and its class in peer_server.py) and mode.
PEERS = {
    "transformers float32": ("transformers", "float32"),
    "transformers bfloat16": ("transformers", "bfloat16"),
    "transformers float32, prompt once": ("transformers", "float32-once"),
    "transformers bfloat16, prompt once": ("transformers", "bfloat16-once"),
    "OpenVINO GenAI float32": ("openvino", "f32"),
    "OpenVINO GenAI default": ("openvino", "default"),
    "OpenVINO GenAI int8": ("openvino", "int8"),
    "OpenVINO GenAI int4": ("openvino", "int4"),
    "llama.cpp f32": ("llama", "f32"),
    "llama.cpp q8_0": ("llama", "q8_0"),
    "llama.cpp q4_0": ("llama", "q4_0"),
    "CTranslate2 float32": ("ctranslate2", "float32"),
    "CTranslate2 int8": ("ctranslate2", "int8"),
    "ONNX Runtime GenAI fp32": ("onnxruntime", "fp32"),
    "ONNX Runtime GenAI int8": ("onnxruntime", "int8"),
    "ONNX Runtime GenAI int4": ("onnxruntime", "int4"),
}
RANKERS = ["transformers float32", "transformers bfloat16", "llama.cpp f32", "llama.cpp q8_0"]


class Peer:
    """A running server: `peer(n)` returns the seconds for n completions, `peer(n, "rank")` those for one ranking."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )

    def wait(self) -> None:
        """Wait until the model is loaded."""
        while self.answer() != "ready":
            pass

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)} ended; see {self.log}")  # type: ignore[arg-type]
        return line.strip()

    def __call__(self, count: int, task: str = "") -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{task} {count}\n".lstrip())
        self.process.stdin.flush()
        while True:
            line = self.answer()
            with suppress(ValueError):  # libraries may print other lines
                return float(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def python(folder: Path, library: str) -> Path:
    return folder / "envs" / library / "bin" / "python"


def install(folder: Path, libraries: list[str]) -> None:
    for library in libraries:
        print(f"installing {library}", file=sys.stderr)
        requirements, bare = ENVIRONMENTS[library]
        subprocess.run([sys.executable, "-m", "venv", folder / "envs" / library], check=True)
        pip = [str(python(folder, library)), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *requirements], check=True)
        if bare:
            subprocess.run([*pip, "--no-deps", *bare], check=True)


def prepare(folder: Path, libraries: list[str], layers: int) -> None:
    """Make the checkpoint with transformers, then convert it for each library, under FOLDER/models."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    for task in ["checkpoint", *libraries]:
        if task == "transformers":  # reads the checkpoint directly
            continue
        command = python(folder, "transformers" if task == "checkpoint" else task)
        if not command.exists():
            print(f"skipped {task}: no environment; run `python -m benchmarks.peers install {folder}`", file=sys.stderr)
            continue
        options = [task, str(folder / "models"), "--layers", str(layers)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        subprocess.run([str(command), str(HERE / "peer_convert.py"), *options], check=True, env=environment)


def start(folder: Path, names: list[str], threads: int) -> dict[str, Peer]:
    """Start servers and load their models; peers without an environment are skipped, with a message on stderr."""
    peers = {}
    (folder / "logs").mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    for name in names:
        library, mode = PEERS[name]
        if library == "transformers" and mode.startswith("bfloat16") and not has_bfloat16():
            without_bfloat16(name)
            continue
        command = python(folder, library)
        if not command.exists():
            print(f"skipped {name}: no {command}; run `python -m benchmarks.peers install {folder}`", file=sys.stderr)
            continue
        options = [library, str(folder / "models"), mode, "--threads", str(threads)]
        peer = Peer(
            [str(command), str(HERE / "peer_server.py"), *options], environment, folder / "logs" / f"{library}-{mode}"
        )
        peer.wait()
        peers[name] = peer
    return peers


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    task = "rank" if arguments.command == "rank" else ""
    peers = start(folder, arguments.peers or (RANKERS if task else list(PEERS)), arguments.threads)
    rates, result = measure_rates(arguments.threads), {}
    try:
        for count in arguments.counts:
            ways = {name: (lambda peer=peer: peer(count, task)) for name, peer in peers.items()}  # noqa: B023
            result[count] = interleave(ways, arguments.repeats, pause=0.2)
            common = {"task": task or "generate", "n": count}
            figures = [{"way": way, **common, "seconds": seconds} for way, seconds in result[count].items()]
            record("peers", figures, rates=rates, path=arguments.output)
            print(f"N = {count} done", file=sys.stderr, flush=True)
    finally:
        for peer in peers.values():
            peer.close()
    print(f"{'seconds':<36}" + "".join(f"{f'N = {count}':>10}" for count in arguments.counts))
    for name in peers:
        print(f"{name:<36}" + "".join(f"{seconds[name]:10.3f}" for seconds in result.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Install, prepare and time other tools.")
    parser.add_argument("command", choices=["install", "prepare", "run", "rank"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--libraries", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--peers", nargs="+", choices=PEERS)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_output(parser)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.command == "install":
        install(folder, arguments.libraries)
    elif arguments.command == "prepare":
        prepare(folder, arguments.libraries, arguments.layers)
    else:
        compare(folder, arguments)


if __name__ == "__main__":
    main()

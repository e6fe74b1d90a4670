"""The kernels of ONNX Runtime's CUDA provider, from its registry: `python -m benchmarks.placement.kernels WHEEL`.

WHEEL is a folder with an unpacked onnxruntime-gpu. The registry is written to `kernels.json`, from which the other
modules decide where nodes run without that wheel.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .stubs import environment, make_stubs

REGISTRY = Path(__file__).with_name("kernels.json")

_PRINT = """
import json, onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def
kernels = [[k.domain, k.op_name, *k.version_range, dict(k.type_constraints)]
           for k in get_all_opkernel_def() if k.provider == "CUDAExecutionProvider"]
print(json.dumps([onnxruntime.__version__, kernels]))
"""


@dataclass(frozen=True)
class Kernel:
    """One entry of the registry.

    Attributes:
        first: since which version of the operator.
        last: up to which one; None for a kernel of the newest.
        types: the types that each type variable of the operator may have, such as `float` and `int64`.
    """

    first: int
    last: int | None
    types: dict[str, frozenset[str]]


def read_kernels(path: Path = REGISTRY) -> tuple[str, dict[tuple[str, str], list[Kernel]]]:
    """Return the version of ONNX Runtime, and its CUDA kernels by domain and operator."""
    saved = json.loads(path.read_text())
    kernels = {
        tuple(name.rsplit("::", 1)): [
            Kernel(first, last, {variable: frozenset(names.split()) for variable, names in types.items()})
            for first, last, types in entries
        ]
        for name, entries in saved["kernels"].items()
    }
    return saved["onnxruntime"], kernels  # type: ignore[return-value]


def registry(wheel: Path) -> str:
    """The registry of a wheel as JSON, a line for each operator."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _PRINT]
        setting = environment(wheel, make_stubs(wheel, Path(folder)))
        version, kernels = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=setting).stdout)
    lines: dict[str, dict[tuple[int, int], dict[str, set[str]]]] = {}
    for domain, operator, first, last, types in kernels:
        entries = lines.setdefault(f"{'' if domain == 'ai.onnx' else domain}::{operator}", {})
        entry = entries.setdefault((first, last), {})
        for variable, names in types.items():
            entry.setdefault(variable, set()).update(_short(names))
    written = [f"{json.dumps(name)}: {json.dumps(_entries(entries))}" for name, entries in sorted(lines.items())]
    return f'{{"onnxruntime": {json.dumps(version)}, "kernels": {{\n' + ",\n".join(written) + "\n}}\n"


def _short(names: Sequence[str]) -> list[str]:
    return [name.removeprefix("tensor(").removesuffix(")") if name.startswith("tensor(") else name for name in names]


def _entries(entries: dict[tuple[int, int], dict[str, set[str]]]) -> list[list[object]]:
    return [
        [first, None if last >= 2**31 - 1 else last, {key: " ".join(sorted(types[key])) for key in sorted(types)}]
        for (first, last), types in sorted(entries.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    REGISTRY.write_text(registry(parser.parse_args().wheel.resolve()))


if __name__ == "__main__":
    main()

"""Run every CUDA parity check and benchmark: `python -m benchmarks.cuda` on a machine with a GPU.

It needs no network: it exports on the CPU, then runs the artifacts with provider="cuda": the recorded cases, random
ragged cases against the CPU provider, that int8 is refused, where the nodes are placed, and the times of `rank` and
`generate` at 85M and 0.5B parameters, float32 and fp16, beside PyTorch and transformers on the same GPU; `generate`
also in the host's loop, with `decode` and with the captured `decode_static`. `--dry-run` does all this on the CPU with
a small network, to try the command itself; its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from bonnx.runtime.engine.providers import installed_flavours

from ..record import add_output, record
from .machine import DRY, Machine
from .parity import parity
from .speed import speed


def run(folder: Path, machine: Machine) -> list[tuple[str, str]]:
    """Print every result at once, because a machine may be taken away at any time; return names and results."""
    rows = []
    for part in (parity, speed):
        for row in part(folder, machine):
            rows.append(row)
            print(f"{row[0]:<52}  {row[1]}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="try the command on the CPU with a small network")
    add_output(parser)
    arguments = parser.parse_args()
    machine = DRY if arguments.dry_run else Machine()
    if machine.provider == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; nothing was measured", file=sys.stderr)
        return 1
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        rows = run(Path(name), machine)
    print(f"\n{machine.name}, {installed_flavours()}, {time.perf_counter() - start:.0f} s")
    if machine.provider == "cuda":
        figures = [{"check": check, "result": result, "device": machine.name} for check, result in rows]
        record("cuda", figures, path=arguments.output)
    return int(any("FAILED" in result for _, result in rows))


if __name__ == "__main__":
    sys.exit(main())

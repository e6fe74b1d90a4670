"""`bonnx inspect`: say what an artifact holds, without ONNX Runtime."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from ..folder import read_verified
from . import print_json

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("artifact", help="folder that `bonnx export` wrote")


def run(arguments: argparse.Namespace) -> int:
    """Print the manifest, or the parts of it that people ask for."""
    manifest = read_verified(Path(arguments.artifact))
    if arguments.json:
        print_json(msgspec.to_builtins(manifest))
        return 0
    size = sum(file.size for file in manifest.files.values())
    scoring, network = manifest.scoring, manifest.network
    print(f"{manifest.name}: {manifest.kind.replace('_', ' ')}, {manifest.precision}, {size / 1e6:.1f} MB")
    print(f"  network  {', '.join(f'{key} {value}' for key, value in network.items() if value is not None)}")
    print(f"  scoring  {', '.join(f'{key} {value}' for key, value in msgspec.to_builtins(scoring).items())}")
    print(f"  limits   {manifest.limits.max_tokens} tokens, {manifest.limits.max_candidates} candidates")
    for name, graph in manifest.graphs.items():
        print(f"  {name}: {graph.file}, opset {graph.opset}")
        for kind, values in (("in ", graph.inputs), ("out", graph.outputs)):
            for value in values:
                print(f"    {kind} {value.name:<18} {value.dtype:<8} ({', '.join(map(str, value.shape))})")
    for parity in manifest.parity:
        print(f"  parity   {parity.check:<28} {parity.cases:>3} cases, greatest difference {parity.max_difference:.2e}")
    if manifest.agreement is not None:
        print(f"  {manifest.agreement}")
    return 0

"""`bonnx inspect`: show what an artifact contains, without ONNX Runtime."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import msgspec

from bonnx.runtime.artifact.describe import describe_scoring, describe_text, listed
from bonnx.runtime.artifact.folder import read_verified

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
    lines = {
        "network": listed(manifest.network),
        "scoring": describe_scoring(manifest.scoring),
        "text": describe_text(manifest),
        "limits": f"{manifest.limits.max_tokens} tokens, {manifest.limits.max_candidates} candidates",
        "source": manifest.source,
    }
    print(f"{manifest.name}: {manifest.kind.replace('_', ' ')}, {manifest.precision}, {size / 1e6:.1f} MB")
    for name, line in lines.items():
        if line is not None:
            print(f"  {name:<8} {line}")
    print("  graphs")
    for graph in manifest.graphs.values():
        # Those of a cache are many and alike: `key.*`, one for each layer.
        stems = ([re.sub(r"\d+$", "*", value.name) for value in values] for values in (graph.inputs, graph.outputs))
        inputs, outputs = (", ".join(dict.fromkeys(names)) for names in stems)
        print(f"    {graph.file}, opset {graph.opset}: {inputs} -> {outputs}")
    print("  maximum error against PyTorch in float64 with the same weights: of ONNX Runtime, of PyTorch, and allowed")
    for parity in manifest.parity:
        errors = f"{parity.max_difference:.1e}  {parity.pytorch_error:.1e}"
        allowed = "as NumPy" if parity.allowed is None else f"{parity.allowed:.1e}"
        print(f"    {parity.check:<28} {parity.cases:>3} cases  {errors}  {allowed}")
    if manifest.agreement is not None:
        print(f"  {manifest.agreement}")
    return 0

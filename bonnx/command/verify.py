"""`bonnx verify`: check an artifact on this machine, without torch."""

from __future__ import annotations

import argparse

from bonnx.runtime.verification import verify

from . import print_json

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("artifact", help="folder that `bonnx export` wrote")
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda"], default="auto", help="where the model runs")


def run(arguments: argparse.Namespace) -> int:
    """Verify and say how close the outputs are."""
    model, checks = verify(arguments.artifact, provider=arguments.provider)
    if arguments.json:
        files = len(model.manifest.files)
        cases = [check.to_dict() for check in checks]
        print_json({"ok": True, "provider": model.provider, "files": files, "cases": cases, "reason": None})
        return 0
    print(f"{len(model.manifest.files)} files are as written; {len(checks)} recorded cases on {model.provider}:")
    for check in checks:
        print(f"  {check.case:<16} maximum difference {check.max_difference:.2e}, best {check.best_index}")
    print("ok")
    return 0

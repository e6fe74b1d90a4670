"""`bonnx doctor`: say what is installed and what is wrong with it."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

from ..errors import ProviderError
from ..session import installed_flavours, runtime_module
from . import print_json

__all__ = ["configure", "diagnose", "run"]

_PACKAGES = ["bonnx", "numpy", "msgspec", "tokenizers", "torch", "onnx", "onnxscript", "safetensors"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: none."""


def diagnose() -> dict[str, Any]:
    """Versions, providers, and problems with what to do about each."""
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    providers, problems = [], []
    try:
        providers = runtime_module().get_available_providers()
    except ProviderError as e:
        problems.append(str(e))
    return {
        "ok": not problems,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions | installed_flavours(),
        "providers": providers,
        "problems": problems,
    }


def run(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; exit 1 if something is wrong."""
    found = diagnose()
    if arguments.json:
        print_json(found)
    else:
        print(f"Python {found['python']} on {found['platform']}")
        for name, version in found["packages"].items():
            print(f"  {name:<16} {version or 'not installed'}")
        print(f"  providers        {', '.join(found['providers']) or 'none'}")
        for problem in found["problems"]:
            print(f"problem: {problem}")
        print("ok" if found["ok"] else "not ok")
    return 0 if found["ok"] else 1

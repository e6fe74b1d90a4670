"""`bonnx doctor`: show what is installed and what is wrong with it. Without an artifact it needs only Python."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TypedDict, cast

from bonnx.errors import BonnxError, ProviderError
from bonnx.runtime.engine.providers import FLAVOURS, installed_flavours

from . import print_json

__all__ = ["configure", "diagnose", "run"]

# Modules whose names are not their packages'.
_MODULES = {"onnxruntime-gpu": "onnxruntime"}
# Versions that an extra does not install, but that work: these wheels for CUDA 12 fit graphs of opset 18.
_FIT_TOO = {"onnxruntime-gpu": ">=1.23"}
# Each runs in a separate process: an import may end it, and an imported module may hide the fault of another.
_PATH = "import sys, json; sys.path[:] = json.loads(sys.argv[1]);"
_IMPORT = f"{_PATH} import importlib; print(importlib.import_module(sys.argv[2]).__file__ or '')"
_RUNTIME = (
    f"{_PATH} from bonnx.runtime.engine.providers import cuda_fault, runtime_module\n"
    "from bonnx.errors import ProviderError\n"
    "try:\n"
    "    runtime = runtime_module()\n"
    "    faults = [fault for fault in [cuda_fault(runtime)] if fault]\n"
    "    print(json.dumps({'providers': runtime.get_available_providers(), 'problems': faults}))\n"
    "except ProviderError as e: print(json.dumps({'problems': [str(e)]}))"
)
_SECONDS = 120
# Extras for work on bonnx itself.
_DEVELOPMENT = ("dev", "docs", "test")


@dataclass
class _Package:
    """A package that bonnx needs, and the state of it on this machine."""

    name: str
    bounds: str
    extra: str | None
    version: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def module(self) -> str:
        return _MODULES.get(self.name, self.name.replace("-", "_"))


class Extra(TypedDict):
    """An extra: the packages that are missing, and the command that installs it."""

    missing: list[str]
    install: str


class OnCuda(TypedDict):
    """A graph's nodes by where they run, and what is copied: see `bonnx.runtime.engine.placement.Placement`."""

    cuda: int
    host: int
    without: dict[str, int]
    copies: int
    body_copies: int


class Diagnosis(TypedDict):
    """What is installed, and what is wrong with it; and where the nodes of an artifact's graphs run on CUDA."""

    ok: bool
    python: str
    platform: str
    packages: dict[str, str | None]
    providers: list[str]
    extras: dict[str, Extra]
    graphs: dict[str, OnCuda]
    problems: list[str]


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the argument."""
    parser.add_argument(
        "artifact",
        nargs="?",
        type=Path,
        help="also show which nodes of its graphs run on CUDA and how much is copied, as ONNX Runtime decides when it "
        "loads them; needs onnxruntime-gpu",
    )


def diagnose(artifact: Path | None = None) -> Diagnosis:
    """Versions, providers, what each extra lacks, and problems with what to do about each."""
    packages, problems = _required()
    with ThreadPoolExecutor(4) as pool:
        runtime = pool.submit(_ask, _RUNTIME)
        installed = [p for p in packages if p.name not in FLAVOURS and (p.version is not None or p.extra is None)]
        failures = [reason for reason in pool.map(_import, installed) if reason]
    printed, failure = runtime.result()
    report: dict[str, list[str]] = json.loads(printed) if printed else {}
    if not printed:
        report["problems"] = [f"ONNX Runtime cannot be loaded: {failure}; install it again"]
    # While a package is hidden, other failing imports mean nothing.
    problems += [reason for package in packages if (reason := _hidden(package))] or [
        *report.get("problems", []),
        *failures,
    ]
    problems += [problem for package in packages for problem in package.problems]
    graphs: dict[str, OnCuda] = {}
    # If ONNX Runtime itself is broken, its problem says all.
    if artifact is not None and not report.get("problems"):
        try:
            graphs = _placed(artifact, report.get("providers", []))
        except BonnxError as e:
            problems.append(str(e))
    return {
        "ok": not problems,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {**{package.name: package.version for package in packages}, **installed_flavours()},
        "providers": report.get("providers", []),
        "extras": _extras(packages),
        "graphs": graphs,
        "problems": list(dict.fromkeys(problems)),
    }


def _placed(artifact: Path, providers: list[str]) -> dict[str, OnCuda]:
    """Where the nodes of each graph run."""
    # Needs packages, which may be missing.
    from bonnx.runtime.engine.placement import place_artifact

    if "CUDAExecutionProvider" not in providers:
        raise ProviderError(
            f"where the nodes of {artifact} run on CUDA needs onnxruntime-gpu; this ONNX Runtime has "
            f"{', '.join(providers) or 'no providers'} only: run `pip uninstall -y onnxruntime`, then "
            "`pip install bonnx[gpu]`"
        )
    return {name: cast(OnCuda, asdict(placement)) for name, placement in place_artifact(artifact).items()}


def _required() -> tuple[list[_Package], list[str]]:
    """The packages that bonnx and its extras name, bonnx first, with their versions; and what is wrong with these."""
    bonnx = _Package("bonnx", "", None)
    try:
        bonnx.version = importlib.metadata.version("bonnx")
        lines = importlib.metadata.requires("bonnx") or []
    except importlib.metadata.PackageNotFoundError:
        return [bonnx], ["bonnx is not installed, only its files are here; run `pip install .` in its folder"]
    packages = [bonnx]
    problems: list[str] = []
    for line in lines:
        match = re.match(r"([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?(?:;.*extra\s*==\s*[\"'](\w+)[\"'])?", line)
        if match is None or match[1] == "bonnx" or match[3] in _DEVELOPMENT:
            continue
        package = _Package(match[1], match[2].strip(), match[3])
        try:
            package.version = importlib.metadata.version(package.name)
        except importlib.metadata.PackageNotFoundError:
            if package.extra is None:
                package.problems.append(f"{package.name} is not installed; run `pip install {package.name}`")
        if package.version is not None and not _within(package.version, _FIT_TOO.get(package.name, package.bounds)):
            package.problems.append(
                f"{package.name} {package.version} is installed, {package.bounds} is needed; "
                f"run `pip install '{package.name}{package.bounds}'`"
            )
        packages.append(package)
    return packages, problems


def _within(version: str, bounds: str) -> bool:
    """Whether a version's numbers lie within bounds such as `>=2.9,<2.14`."""
    for operator, bound in re.findall(r"(>=|<=|==|!=|<|>)\s*([\w.]+)", bounds):
        here, there = _numbers(version), _numbers(bound)
        width = max(len(here), len(there))
        ours, other = (numbers + (0,) * (width - len(numbers)) for numbers in (here, there))
        fits = {">=": ours >= other, "<=": ours <= other, "==": ours == other, "!=": ours != other, "<": ours < other}
        if not fits.get(operator, ours > other):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _extras(packages: list[_Package]) -> dict[str, Extra]:
    """For each extra the packages that are missing, and how to install them."""
    extras: dict[str, Extra] = {}
    have = {package.name for package in packages if package.version is not None}
    for package in packages:
        if package.extra is None or (package.name in FLAVOURS and package.name not in have and have & set(FLAVOURS)):
            # Of the two flavours of ONNX Runtime one is enough.
            continue
        entry = extras.setdefault(package.extra, {"missing": [], "install": f"pip install 'bonnx[{package.extra}]'"})
        entry["missing"] += [package.name] if package.version is None else []
    return extras


def _import(package: _Package) -> str | None:
    """Why an installed package cannot be imported; None if it can."""
    if package.name == "bonnx" or package.version is None:
        return None
    printed, failure = _ask(_IMPORT, package.module)
    again = f"run `pip install --force-reinstall {package.name}`"
    if failure:
        return f"{package.name} is installed but cannot be imported: {failure}; {again}"
    if not printed:
        return f"{package.name}: its folder holds no code; {again}"
    return None


def _hidden(package: _Package) -> str | None:
    """The other module that Python imports in place of an installed package; None if there is none."""
    if package.version is None:
        return None
    place = str(importlib.metadata.distribution(package.name).locate_file(""))
    first, installed = (PathFinder.find_spec(package.module, path) for path in (sys.path, [place]))
    if (
        first is None
        or installed is None
        or None in (first.origin, installed.origin)
        or first.origin == installed.origin
    ):
        return None
    return f"{first.origin} is imported in place of {package.name}; rename or remove it, then run `bonnx doctor` again"


def _ask(code: str, *arguments: str) -> tuple[str, str | None]:
    """The last line that a Python process with this one's path prints, and its error if it fails."""
    command = [sys.executable, "-c", code, json.dumps(sys.path), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "", f"it takes more than {_SECONDS} s"
    if done.returncode:
        errors = done.stderr.strip().splitlines()
        return "", errors[-1] if errors else f"the process ended with {done.returncode}"
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "", None


def run(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; exit 1 if something is wrong."""
    diagnosis = diagnose(arguments.artifact)
    if arguments.json:
        print_json(diagnosis)
        return 0 if diagnosis["ok"] else 1
    print(f"Python {diagnosis['python']} on {diagnosis['platform']}")
    for name, version in diagnosis["packages"].items():
        if version is not None:
            print(f"  {name:<20} {version}")
    print(f"  {'providers':<20} {', '.join(diagnosis['providers']) or 'none'}")
    print("extras")
    for name, entry in diagnosis["extras"].items():
        state = f"missing {', '.join(entry['missing'])}: {entry['install']}" if entry["missing"] else "installed"
        print(f"  {name:<20} {state}")
    _print_graphs(diagnosis["graphs"])
    for problem in diagnosis["problems"]:
        print(f"problem: {problem}")
    print("ok" if diagnosis["ok"] else "not ok")
    return 0 if diagnosis["ok"] else 1


def _print_graphs(graphs: dict[str, OnCuda]) -> None:
    if not graphs:
        return
    print("graphs                 on CUDA   on the CPU   no kernel   copies   copies in bodies")
    for name, placed in graphs.items():
        numbers = placed["cuda"], placed["host"], sum(placed["without"].values()), placed["copies"]
        print(f"  {name:<20} {'{:>7} {:>12} {:>11} {:>8}'.format(*numbers)} {placed['body_copies']:>18}")
    without = sorted({operator for placed in graphs.values() for operator in placed["without"]})
    if without:
        print(f"  no CUDA kernel       {', '.join(without)}")

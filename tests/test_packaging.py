"""The package as it is installed: complete, and light where it promises to be."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bonnx

tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")

ROOT = Path(__file__).parent.parent
ROOMS = {
    "bonnx": "bonnx",
    "export": "bonnx.export",
    "js": "bonnx.js",
    "models": "bonnx.models",
    "runtime": "bonnx.runtime",
}


def test_every_package_of_the_tree_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {}
    for folder, package in ROOMS.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            inner = path.parent.relative_to(ROOT / folder).parts
            found[".".join([package, *inner])] = "/".join([folder, *inner])
    assert settings["packages"] == sorted(found)
    assert settings["package-dir"] == found


def test_every_module_has_a_layer():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layered = set(re.findall(r"[\w.]+", " ".join(contract["layers"])))
    modules = [path for path in (ROOT / "runtime").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert {f"bonnx.runtime.{path.stem}" for path in modules if path.name != "__init__.py"} <= layered


def test_the_version_is_that_of_the_distribution():
    assert bonnx.__version__ == importlib.metadata.version("bonnx")


def test_public_names():
    assert bonnx.__all__ == [
        "AGGREGATIONS",
        "FINISH_REASONS",
        "ArtifactError",
        "BestOfN",
        "BestOfNResult",
        "BonnxError",
        "Candidate",
        "Check",
        "Completion",
        "ExportError",
        "Failure",
        "FakeModel",
        "Generation",
        "InputError",
        "Model",
        "ModelLike",
        "NoWinnerError",
        "ProviderError",
        "Ranking",
        "Scored",
        "Upstream",
        "UpstreamError",
        "load",
        "reward_function",
        "verify",
    ]
    assert all(hasattr(bonnx, name) for name in bonnx.__all__)


# Stands for an environment without these packages: importing them fails as it would there.
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split(".")[0])
sys.meta_path.insert(0, Absent())
"""
HEAVY = {"torch", "onnx", "onnxscript", "safetensors", "matplotlib", "transformers"}


def run_without(names, code):
    script = BLOCK.format(names=sorted(names)) + code
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


def test_rank_verify_and_configs_need_no_torch_and_no_onnx(countdown, tmp_path):
    (tmp_path / "candidates.txt").write_text("12-3=9;\n25-7=18;\n")
    code = f"""
import bonnx, bonnx.models
from bonnx.command import main
assert main(["verify", {str(countdown)!r}, "--json"]) == 0
assert main(["rank", {str(countdown)!r}, "--prompt", "3,7,12,25>98:",
             "--candidates", {str(tmp_path / "candidates.txt")!r}, "--json"]) == 0
assert main(["export"]) == 1
assert not set({sorted(HEAVY)!r}) & set(sys.modules)
"""
    done = run_without(HEAVY, code)
    assert done.returncode == 0, done.stderr
    assert '"best_index"' in done.stdout
    assert "is not installed; run `pip install bonnx[export]`" in done.stderr


def test_without_onnx_runtime_the_error_says_what_to_install(small):
    done = run_without({"onnxruntime"}, f"import bonnx\nbonnx.load({str(small)!r})")
    assert "ProviderError: ONNX Runtime is not installed; run `pip install bonnx[cpu]`" in done.stderr


@pytest.mark.parametrize("room", ["runtime", "bonnx", "models/config.py"])
def test_lint_bans_torch_where_it_must_not_be(room, tmp_path):
    target = ROOT / room
    path = target if target.is_file() else target / "__init__.py"
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", str(path), "-"],
        input="import torch\nimport onnx\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.count("TID251") == 2

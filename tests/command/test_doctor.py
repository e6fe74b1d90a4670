"""`bonnx doctor` in every broken state: in processes of their own, whose packages are made up."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11 on")

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = ["jinja2", "msgspec", "numpy", "rich", "tokenizers"]
RUNTIME = "class InferenceSession: pass\ndef get_available_providers(): return ['CPUExecutionProvider']\n"
EXTRAS = {"export", "gguf", "hub", "parquet", "ray", "report", "serve", "upstream"}


@pytest.fixture
def site(tmp_path):
    """Where made-up packages go. bonnx and what it needs are there, ONNX Runtime is not."""
    folder = tmp_path / "site"
    folder.mkdir()
    needs = [f"Requires-Dist: {line}" for line in importlib.metadata.requires("bonnx")]
    install(folder, "bonnx", "0.1.0", None, *needs)
    for name in CORE:
        install(folder, name, "99.0", "")
    return folder


def install(site, name, version, code, *lines):
    """A package: its metadata, and a module with this code."""
    metadata = site / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
    )
    if code is not None:
        module = site / name.removesuffix("-gpu").replace("-", "_")
        module.mkdir(exist_ok=True)
        (module / "__init__.py").write_text(code)


def run(site, *arguments, first=None):
    """The command, with the packages of `site` only, and before them what is in the folder `first`."""
    files = site.parent / "files"
    if not files.exists():
        # Without what an editable install has put beside them.
        files.mkdir()
        (files / "bonnx").symlink_to(ROOT / "bonnx")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*([first] if first else []), site, files]))
    # -S: without the packages that are really installed.
    command = [sys.executable, "-S", "-m", "bonnx", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=site.parent, check=False)


def doctor(site, *options, first=None):
    done = run(site, "doctor", *options, first=first)
    assert done.stderr == ""
    return done


def diagnosis(site, first=None):
    done = doctor(site, "--json", first=first)
    report = json.loads(done.stdout)
    assert (report["ok"], done.returncode) in ((True, 0), (False, 1))
    return report


def test_the_extras_that_are_missing(site):
    install(site, "onnxruntime", "1.32.0", RUNTIME)
    report = diagnosis(site)
    assert (report["ok"], report["problems"], report["providers"]) == (True, [], ["CPUExecutionProvider"])
    assert set(report["extras"]) == EXTRAS | {"cpu"}
    assert report["extras"]["cpu"]["missing"] == []
    for extra in EXTRAS:
        needed = [re.match(r"[\w.-]+", line)[0] for line in SETTINGS["optional-dependencies"][extra]]
        assert report["extras"][extra]["missing"] == [name for name in needed if name != "bonnx"]
        assert report["extras"][extra]["install"] == f"pip install 'bonnx[{extra}]'"
    lines = doctor(site).stdout.splitlines()
    assert "  report               missing matplotlib: pip install 'bonnx[report]'" in lines
    assert lines[-1] == "ok"


def test_nothing_is_installed(tmp_path):
    report = diagnosis(tmp_path / "nowhere")
    bonnx, runtime = report["problems"]
    assert bonnx.startswith("bonnx is not installed, only its files are here")
    assert runtime.startswith("ONNX Runtime is not installed; run `pip install bonnx[cpu]`")


def remains(site):
    (site / "onnxruntime" / "capi").mkdir(parents=True)


def stub(site):
    (site / "onnxruntime.py").write_text("# mine\n")


def failing(code):
    return lambda site: install(site, "onnxruntime", "1.32.0", code)


def both(site):
    install(site, "onnxruntime", "1.32.0", RUNTIME)
    install(site, "onnxruntime-gpu", "1.32.0", None)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (remains, r"site/onnxruntime is a folder without code.*delete it"),
        (stub, r"site/onnxruntime\.py is not ONNX Runtime: it has no InferenceSession.*rename it"),
        (both, "both onnxruntime and onnxruntime-gpu are installed.*pip uninstall -y onnxruntime onnxruntime-gpu"),
        (
            failing("import onnxruntime.missing"),
            "cannot be loaded: ModuleNotFoundError: No module named.*--force-reinstall",
        ),
        (
            failing("raise ImportError('libfoo.so: no such file')"),
            "cannot be loaded: ImportError: libfoo.so: no such file",
        ),
        (failing("raise RuntimeError('no AVX')"), "cannot be loaded: RuntimeError: no AVX"),
        (failing("import os; os.kill(os.getpid(), 11)"), "ONNX Runtime cannot be loaded: the process ended with -11"),
        (failing("raise SystemExit('leave')"), "ONNX Runtime cannot be loaded: leave"),
    ],
)
def test_a_broken_onnx_runtime(site, breaks, message):
    breaks(site)
    report = diagnosis(site)
    assert [bool(re.search(message, problem)) for problem in report["problems"]] == [True], report["problems"]
    assert report["providers"] == []


def test_cuda_that_cannot_be_loaded(site):
    """ONNX Runtime calls its provider available even if a library of CUDA is missing."""
    code = "__version__, cuda_version = '1.31.1', '13.0'\n"
    code += RUNTIME.replace("['", "['CUDAExecutionProvider', '")
    install(site, "onnxruntime-gpu", "1.31.1", code)
    install(site, "nvidia-cublas-cu12", "12.4.5", None)
    install(site, "nvidia-cudnn-cu12", "9.1", None)
    report = diagnosis(site)
    assert report["providers"] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    (problem,) = report["problems"]
    assert problem.startswith("onnxruntime-gpu 1.31.1 cannot use CUDA: ")
    assert "libonnxruntime_providers_shared.so: cannot open shared object file" in problem
    assert "built for CUDA 13, and installed are nvidia-cublas-cu12 12.4.5, nvidia-cudnn-cu12 9.1; run" in problem


@pytest.mark.parametrize(("version", "fits"), [("1.26.0", True), ("1.22.0", False)])
def test_wheels_for_cuda_12(site, version, fits):
    install(site, "onnxruntime-gpu", version, RUNTIME)
    report = diagnosis(site)
    assert report["ok"] == fits
    assert all(problem.startswith(f"onnxruntime-gpu {version} is installed, >=") for problem in report["problems"])


def test_other_packages_that_are_broken(site):
    install(site, "onnxruntime", "1.32.0", RUNTIME)
    install(site, "torch", "2.10.0", "raise OSError('libtorch.so: cannot open')")
    install(site, "onnx", "1.2", "")
    install(site, "uvicorn", "99.0", None)
    (site / "matplotlib").mkdir()
    install(site, "matplotlib", "99.0", None)
    problems = "\n".join(diagnosis(site)["problems"])
    assert "torch is installed but cannot be imported: OSError: libtorch.so: cannot open; run `pip install" in problems
    assert "onnx 1.2 is installed, >=1.19 is needed; run `pip install 'onnx>=1.19'`" in problems
    assert "uvicorn is installed but cannot be imported: ModuleNotFoundError" in problems
    assert "matplotlib: its folder holds no code" in problems
    assert len(problems.splitlines()) == 4


@pytest.mark.parametrize("name", ["msgspec", "onnxruntime"])
def test_a_module_that_hides_a_package(site, name):
    """Installing the package again would not help."""
    install(site, "onnxruntime", "1.32.0", RUNTIME)
    install(site, "onnx", "99.0", f"import {name}")
    folder = site.parent / "mine"
    folder.mkdir()
    hiding = folder / f"{name}.py"
    hiding.write_text("raise ValueError('mine')")
    (problem,) = diagnosis(site, first=folder)["problems"]
    assert problem.startswith(f"{hiding} is imported in place of {name}; rename or remove it")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ValueError('broken')", "a package cannot be imported: ValueError: broken"),
        ("import numpy.parts", "numpy.parts cannot be imported: No module named 'numpy.parts'"),
    ],
    ids=["an error", "a missing module"],
)
def test_a_package_that_fails_under_a_command(site, code, reason):
    """One line, whatever it raises, and no advice to install what is there."""
    (site / "msgspec" / "__init__.py").write_text(code)
    done = run(site, "inspect", "x")
    assert (done.returncode, done.stderr) == (1, f"bonnx inspect: {reason}; run `bonnx doctor`\n")


def test_without_what_every_command_needs(site):
    """The doctor still comes, and other commands say what is missing."""
    install(site, "onnxruntime", "1.32.0", RUNTIME)
    for path in site.glob("msgspec*"):
        path.rename(path.with_name(f"gone-{path.name}"))
    assert diagnosis(site)["problems"] == ["msgspec is not installed; run `pip install msgspec`"]
    done = run(site, "inspect", "x")
    assert done.stderr == "bonnx inspect: msgspec is not installed; run `pip install bonnx`\n"
    assert done.returncode == 1
    assert run(site, "--version").stderr == ""


def test_version(site):
    done = subprocess.run([sys.executable, "-m", "bonnx", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"bonnx {importlib.metadata.version('bonnx')}\n"

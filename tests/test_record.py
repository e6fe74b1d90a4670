"""The record of the benchmarks: what is written is read back, with what it was measured on."""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.record import MEASUREMENTS, add_output, read_runs, record
from tests.pages import ROOT


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rank.py", str(tmp_path / "artifact"), "--counts", "1"])
    return tmp_path / "measurements.jsonl"


def test_figures_are_read_back_by_run(path, rng):
    values = rng.uniform(0.001, 1000, 4)
    figures = [{"way": f"way {i}", "n": i, "seconds": float(value)} for i, value in enumerate(values)]
    record("rank", figures[:1], rates={"memory": 20.0}, path=path)
    record("rank", figures[1:3], rates={"memory": 20.0}, path=path)
    record("prune", figures[3:], path=path)
    (rank, one), (prune, other) = read_runs(path).items()
    assert (rank[0], prune[0]) == ("rank", "prune")
    assert (one["rates"], other["rates"]) == ({"memory": 20.0}, None)
    read = one["figures"] + other["figures"]
    assert [(f["way"], f["n"]) for f in read] == [(f["way"], f["n"]) for f in figures]
    assert [f["seconds"] for f in read] == pytest.approx(values, rel=5e-5)


def test_a_line_says_what_ran_on_what(path):
    record("rank", [], path=path)
    line = json.loads(path.read_text())
    assert line["command"] == "python -m benchmarks.rank artifact --counts 1"
    versions = {"python": platform.python_version(), "torch": importlib.metadata.version("torch")}
    assert versions.items() <= line["versions"].items()
    assert line["processor"]
    assert line["load"] is None or line["load"] >= 0
    assert line["cores"] >= 1
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert head.stdout.startswith(line["commit"])


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="this system does not show the flags")
def test_flags_are_those_of_the_processor(path):
    record("rank", [], path=path)
    words = set(Path("/proc/cpuinfo").read_text().split())
    flags = json.loads(path.read_text())["flags"]
    assert set(flags) <= words
    assert ("avx2" in flags) == ("avx2" in words)


def test_figures_go_to_the_repository_unless_told_otherwise():
    parser = argparse.ArgumentParser()
    add_output(parser)
    assert parser.parse_args([]).output == MEASUREMENTS == ROOT / "benchmarks/measurements.jsonl"
    assert parser.parse_args(["-o", "other"]).output == Path("other")

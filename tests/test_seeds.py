"""A random test that failed can be run again with the same numbers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import random, numpy as np
from hypothesis import given, strategies as st

drawn = []

@given(st.integers(0, 2**60))
def test_hypothesis(number):
    drawn.append(number)

def test_all(rng, dice):
    numbers = [*rng.integers(2**60, size=3).tolist(), dice.random(), random.random(), np.random.rand()]
    print("drew", numbers, drawn[-3:])
    assert not numbers
"""


@pytest.fixture(scope="module")
def pytest_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "test_it.py").write_text(TESTS)

    plugins = ["tests.seeds", "xdist.plugin", "_hypothesis_pytestplugin"]
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(folder)]
    command += [word for plugin in plugins for word in ("-p", plugin)]
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def run(*options):
        done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=folder, env=environment)
        printed = done.stdout
        seed = re.search(r"Replay the random numbers of this run with --seed (\d+)", printed)
        return seed[1], re.findall(r"^drew .*", printed, re.MULTILINE)[0]

    return run


def test_a_seed_replays_every_generator(pytest_run):
    seed, drawn = pytest_run("-n", "1")
    assert pytest_run("--seed", seed) == (seed, drawn)
    # Alone, a test draws what it drew among others; hypothesis' numbers are those of another test here.
    _, alone = pytest_run("--seed", seed, "-k", "all")
    assert alone.split("]")[0] == drawn.split("]")[0]
    other, different = pytest_run("-k", "all")
    assert other != seed
    assert different.split("]")[0] != drawn.split("]")[0]

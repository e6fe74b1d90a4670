"""One seed for every random number of a test run, so that a failure can be replayed: `pytest --seed N`.

Each test draws from generators of its own, made from the seed and the test's name: the `rng` and `dice` fixtures, the
global generators of `random`, numpy and PyTorch, and hypothesis. So one test alone draws what it drew among all.
"""

import random
import sys
import zlib

import numpy as np
import pytest


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="of every random number; a fresh one if not given")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if hasattr(config, "workerinput"):
        config.option.seed = config.workerinput["seed"]
    if config.option.seed is None:
        config.option.seed = int(np.random.SeedSequence().entropy) % 2**32
    # Hypothesis reads its own after this.
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(config.option.seed)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Tell the processes of pytest-xdist."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config):
    return f"seed: {config.option.seed} (replay with --seed {config.option.seed})"


def pytest_terminal_summary(terminalreporter, config):
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"Replay the random numbers of this run with --seed {config.option.seed}")


def own_seed(config, item):
    """Of one test: four bytes each from the run and from the test's name."""
    return [config.option.seed, zlib.crc32(item.nodeid.encode())]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    # After the fixtures, which are shared: which test makes them must not matter.
    seed = int(np.random.SeedSequence(own_seed(item.config, item)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what libraries draw from
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.fixture
def rng(request):
    """Fresh cases at every run, or those of `--seed`."""
    return np.random.default_rng(own_seed(request.config, request.node))


@pytest.fixture
def dice(rng):
    """The same for what takes Python's own generator."""
    return random.Random(int(rng.integers(2**63)))

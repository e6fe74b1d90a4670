"""Artifacts that many tests share: exported once, never changed; a test that edits one copies it first."""

import gc
import json
import os
import shutil
import signal

import hypothesis
import pytest
import torch
from filelock import FileLock
from jsonschema import Draft202012Validator
from xdist.scheduler import LoadFileScheduling

import bonnx
from bonnx.export import artifact
from bonnx.export.artifact import export_model
from bonnx.models import build
from bonnx.models.config import LanguageModelConfig, NetworkConfig
from bonnx.models.network import LanguageModel
from bonnx.runtime.artifact.manifest import Limits, Scoring
from bonnx.runtime.artifact.schema import SCHEMA_FILE
from bonnx.runtime.engine.engine import open_engine
from tests import command_line, seeds
from tests.seeds import (
    dice,
    pytest_configure,
    pytest_configure_node,
    pytest_report_header,
    pytest_runtest_call,
    pytest_terminal_summary,
    rng,
)

__all__ = [
    "dice",
    "pytest_configure",
    "pytest_configure_node",
    "pytest_report_header",
    "pytest_runtest_call",
    "pytest_terminal_summary",
    "rng",
]


if "PYTEST_XDIST_WORKER" in os.environ:
    # These processes share the cores, and threads of PyTorch in each of them would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# A shell starts what runs in the background with SIGINT ignored; every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# How long one example takes says nothing on a machine that does other things too.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser):
    seeds.pytest_addoption(parser)
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")
    parser.addoption("--real-model", metavar="FOLDER", help="a trained language model, for the slow tests")


def pytest_collection_modifyitems(config, items):
    """Skip slow tests unless they are asked for, by `--slow` or by `-m`."""
    if config.option.slow or "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run it with --slow"))


def pytest_collection_finish():
    """PyTorch and transformers stay in memory to the end, so the garbage collector need not visit their objects."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n N` the tests of one file run in one process: they share what its fixtures make."""
    # Files in the order of their names: tests of export take minutes and must not begin last, though they are few.
    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log) if config.option.dist == "load" else None


def made_once(tmp_path_factory, name, make):
    """A folder, most often an artifact, made by whichever of pytest-xdist's processes is the first to need it."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    made = folder / name / "artifact"
    with FileLock(folder / f"{name}.lock"):
        # It is there as a whole or not at all.
        if not made.exists():
            make(made)
    return made


@pytest.fixture(scope="session")
def manifest_schema():
    """Checks a manifest against the JSON Schema that ships."""
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.fixture(scope="session", autouse=True)
def _exports_follow_the_schema(manifest_schema):
    """Whatever a test exports in this process has a manifest that follows the schema."""
    write = artifact.seal

    def checked(manifest):
        text = write(manifest)
        manifest_schema.validate(json.loads(text))
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "seal", checked)
        yield


@pytest.fixture(scope="session")
def network():
    torch.manual_seed(7)
    return build(embed_dim=12, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, scorer_hidden=8).eval()


@pytest.fixture(scope="session")
def small(network, tmp_path_factory):
    """Artifact of a small random network over embeddings, limits low enough to be met."""
    options = {"name": "small", "limits": Limits(max_tokens=40, max_candidates=30)}
    return made_once(tmp_path_factory, "small", lambda folder: export_model(network, folder, **options))


@pytest.fixture(scope="session")
def exported_countdown(tmp_path_factory):
    """The folder in which `bonnx export` ran without a checkpoint: artifact, Triton repository, what it printed."""

    def make(folder):
        unfinished = folder.with_name("unfinished")
        unfinished.mkdir(parents=True)
        done = command_line.run(unfinished, "export", "--triton", "repository", "--json")
        assert done.returncode == 0, done.stderr
        (unfinished / "printed.json").write_text(done.stdout)
        unfinished.rename(folder)

    return made_once(tmp_path_factory, "countdown", make)


@pytest.fixture(scope="session")
def countdown(exported_countdown):
    """Artifact of the model that ships."""
    return exported_countdown / "artifacts" / "countdown"


@pytest.fixture(scope="session")
def static_engine(tmp_path_factory):
    """The model that ships with a static cache, which is used on the CPU here."""

    def make(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = ["export", "--cuda-graph", "--verify", "quick", "-o", str(folder), "--json"]
        done = command_line.run(folder.parent, *command)
        assert done.returncode == 0, done.stderr

    engine = open_engine(made_once(tmp_path_factory, "countdown_cuda_graph", make))
    assert not engine.static_cache
    engine.static_cache = True
    return engine


@pytest.fixture(scope="session")
def language_model():
    """Small, with a sliding window that prompts and completions cross, and a head of its own."""
    torch.manual_seed(8)
    network = NetworkConfig(
        embed_dim=12, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, scorer_hidden=8, sliding_window=5
    )
    return LanguageModel(LanguageModelConfig(network=network, vocab_size=130, tie_embeddings=False)).eval()


@pytest.fixture(scope="session")
def tiny(language_model, tmp_path_factory):
    """Artifact of the small language model: no tokenizer, no end token."""
    options = {"name": "tiny", "scoring": Scoring(step_token=3)}
    return made_once(tmp_path_factory, "tiny", lambda folder: export_model(language_model, folder, **options))


@pytest.fixture
def edited(small, tmp_path):
    """A copy of the small artifact that a test may damage."""
    return shutil.copytree(small, tmp_path / "edited")


@pytest.fixture(scope="session")
def engine(small):
    return open_engine(small)


@pytest.fixture(scope="session")
def model(small):
    return bonnx.load(small)

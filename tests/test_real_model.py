"""A trained language model writes what transformers writes: `pytest -m slow --real-model FOLDER`."""

import subprocess
import sys
from pathlib import Path

import pytest

from bonnx.models import load_checkpoint, save_checkpoint
from tests.real_text import PROMPTS, compare_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real_model(request):
    folder = request.config.getoption("--real-model")
    if folder is None:
        pytest.skip("pass --real-model FOLDER, a trained language model as transformers writes it")
    return Path(folder)


@pytest.fixture(scope="module")
def artifact(real_model, tmp_path_factory):
    """Through the commands, with the default bars; the scorer's weights are fresh."""
    folder = tmp_path_factory.mktemp("real")
    model, metadata = load_checkpoint(real_model, new_scorer=True)
    save_checkpoint(model, folder / "checkpoint", metadata=metadata, tokenizer_from=real_model)
    command = [
        sys.executable,
        "-m",
        "bonnx",
        "export",
        "--checkpoint",
        folder / "checkpoint",
        "-o",
        folder / "artifact",
    ]
    subprocess.run(command, check=True)
    return folder / "artifact"


def test_greedy_and_sampled_text_are_those_of_transformers(real_model, artifact):
    for kind, same in compare_text(real_model, artifact).items():
        assert not same.different, kind
        # Where rounding decides a token, either may be right; that is rare.
        assert same.equal >= 0.9 * len(PROMPTS), kind

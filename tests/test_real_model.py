"""A trained language model writes what transformers writes: `pytest -m slow --real-model FOLDER`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bonnx
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
    """Through the command, with the default bars: a language model needs no scorer."""
    folder = tmp_path_factory.mktemp("real") / "artifact"
    command = ["export", "--checkpoint", real_model, "-o", folder, "--no-scorer"]
    subprocess.run([sys.executable, "-m", "bonnx", *command], check=True)
    return folder


def test_greedy_and_sampled_text_are_those_of_transformers(real_model, artifact):
    for kind, same in compare_text(real_model, artifact).items():
        assert not same.different, kind
        # Where rounding decides a token, either may be right; that is rare.
        assert same.equal >= 0.9 * len(PROMPTS), kind


def test_scores_are_the_self_certainty_of_transformers_predictions(real_model, artifact):
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    prompt = AutoTokenizer.from_pretrained(real_model)(PROMPTS[0])["input_ids"]
    for candidate in bonnx.load(artifact).generate(prompt, n=4, max_new_tokens=16, seed=0).candidates:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *candidate.tokens]])).logits[0, len(prompt) - 1 : -1]
        expected = -(logits.double().softmax(-1) * logits.shape[-1]).log().mean(-1)
        # As at export: an eighth of this is PyTorch's own error.
        assert np.abs(candidate.scores - expected.numpy()).max() < 2e-3

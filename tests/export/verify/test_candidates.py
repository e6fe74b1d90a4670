"""Candidates that share a row with their prompt score as whole rows do."""

import numpy as np
import pytest
import torch

from bonnx.export.verify import candidates
from bonnx.export.verify.exact import score_rows
from bonnx.models import build
from bonnx.runtime.artifact.manifest import Scoring
from bonnx.runtime.text.padding import pad
from tests.tolerance import RUNTIME, within

YARN_LIKE = {"kind": "dynamic", "factor": 4.0, "original_max_positions": 12}
OPTIONS = [
    {},
    {"sliding_window": 3, "sliding_layers": [0]},
    {"rope_scaling": YARN_LIKE},
    {"unrotated_layers": [1]},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_they_score_as_whole_rows(options, rng, monkeypatch):
    torch.manual_seed(int(rng.integers(2**31)))
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "scorer_hidden": 8}
    network = build(embed_dim=8, **sizes, **options).eval()
    prompt = rng.standard_normal((int(rng.integers(1, 9)), 8), np.float32)
    own = [rng.standard_normal((int(rng.integers(1, 9)), 8), np.float32) for _ in range(6)]
    monkeypatch.setattr(candidates, "_TOKENS", int(rng.integers(60)))
    scores = candidates.score_candidates(network, prompt, own, Scoring())
    rows, mask = pad([np.concatenate([prompt, item]) for item in own], 0)
    expected = score_rows(network, rows, Scoring(), mask)[1][:, len(prompt) :]
    real = mask[:, len(prompt) :] > 0
    assert within(scores[real], expected[real], RUNTIME)

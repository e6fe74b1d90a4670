"""The network's own rules: padding, causality, sliding window, dropout, rotary scaling."""

import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from bonnx.models import LanguageModel, LanguageModelConfig, NetworkConfig, RopeScaling, build, select_best_of_n
from bonnx.models.rotary import inverse_frequencies
from tests.tolerance import RUNTIME, within

SMALL = {"embed_dim": 10, "hidden_size": 16, "num_layers": 2, "scorer_hidden": 8}


@pytest.mark.parametrize(
    "kind", [kind for kind in get_args(get_type_hints(NetworkConfig)["scorer_kind"]) if kind != "none"]
)
def test_a_scorer_of_any_kind_gives_each_label_a_value_at_every_position(kind, rng):
    network = build(**SMALL, scorer_kind=kind, num_labels=3).eval()
    with torch.no_grad():
        backbone, scores = network(torch.from_numpy(rng.standard_normal((2, 7, 10)).astype(np.float32)))
        alone = network.scorer(backbone[0, 1])
    assert scores.shape == (2, 7, 3)
    assert within(alone, scores[0, 1], RUNTIME)
    assert all(layer.in_features == 16 for layer in network.scorer.readers)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"qk_norm": True, "final_norm": "rms"}])
def test_padding_on_either_side_changes_nothing(options, rng):
    network = build(**SMALL, **options).eval()
    rows = torch.from_numpy(rng.standard_normal((2, 7, 10)).astype(np.float32))
    left, right = (int(n) for n in rng.integers(0, 5, 2))
    padded = torch.nn.functional.pad(rows, (0, 0, left, right), value=3.0)
    mask = torch.nn.functional.pad(torch.ones(2, 7, dtype=torch.int64), (left, right))
    with torch.no_grad():
        backbone, scores = network(rows)
        outputs = network(padded, mask)
    assert within(outputs[0][:, left : left + 7], backbone, RUNTIME)
    assert within(outputs[1][:, left : left + 7], scores, RUNTIME)


def test_later_tokens_never_change_earlier_scores(rng):
    network = build(**SMALL).eval()
    rows = torch.from_numpy(rng.standard_normal((1, 9, 10)).astype(np.float32))
    changed = rows.clone()
    changed[:, 5:] += 1.0
    with torch.no_grad():
        (_, a), (_, b) = network(rows), network(changed)
    assert torch.equal(a[:, :5], b[:, :5])
    assert not torch.equal(a[:, 5:], b[:, 5:])


def test_a_sliding_window_forgets_what_lies_before_it(rng):
    """With one layer a position sees exactly the window."""
    network = build(**{**SMALL, "num_layers": 1}, sliding_window=3).eval()
    rows = torch.from_numpy(rng.standard_normal((1, 8, 10)).astype(np.float32))
    with torch.no_grad():
        base = network(rows)[1][0, 7]
        for place in range(8):
            changed = rows.clone()
            changed[0, place] += 1.0
            assert torch.equal(network(changed)[1][0, 7], base) == (place < 5)


def test_dropout_acts_in_training_only(rng):
    network = build(**SMALL, dropout=0.5)
    rows = torch.from_numpy(rng.standard_normal((1, 4, 10)).astype(np.float32))
    assert not torch.equal(network.train()(rows)[0], network(rows)[0])
    assert torch.equal(network.eval()(rows)[0], network(rows)[0])


def test_language_model_gives_logits_and_scores():
    network = NetworkConfig(embed_dim=16, hidden_size=16, num_layers=1)
    for tied in (True, False):
        model = LanguageModel(LanguageModelConfig(network=network, vocab_size=11, tie_embeddings=tied)).eval()
        backbone, scores, logits = model(torch.zeros(2, 3, dtype=torch.int64))
        assert (backbone.shape, scores.shape, logits.shape) == ((2, 3, 16), (2, 3, 1), (2, 3, 11))
        assert hasattr(model, "head") is not tied


def test_scaled_rotary_frequencies():
    sizes = {"embed_dim": 64, "hidden_size": 64, "num_heads": 1, "num_kv_heads": 1}
    plain = inverse_frequencies(NetworkConfig(**sizes)).double()
    expected = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    assert within(plain, expected, (1e-6, 0.0))
    linear = NetworkConfig(**sizes, rope_scaling=RopeScaling(kind="linear", factor=4.0))
    assert within(inverse_frequencies(linear), expected / 4, (1e-6, 0.0))
    scaling = RopeScaling(kind="llama3", factor=8.0, original_max_positions=256)
    frequencies = inverse_frequencies(NetworkConfig(**sizes, rope_scaling=scaling)).double()
    for value, frequency in zip(frequencies.tolist(), expected.tolist(), strict=True):
        # Meta's reference code, by wavelength.
        wavelength = 2 * math.pi / frequency
        if wavelength < 256 / 4:
            wanted = frequency
        elif wavelength > 256 / 1:
            wanted = frequency / 8
        else:
            smooth = (256 / wavelength - 1) / (4 - 1)
            wanted = (1 - smooth) * frequency / 8 + smooth * frequency
        assert value == pytest.approx(wanted, rel=1e-5)


def test_selection_needs_a_candidate_axis():
    for scores in (torch.tensor(1.0), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="at least one candidate on axis 0"):
            select_best_of_n(scores)
    assert select_best_of_n(torch.tensor([[1, 5], [3, 5]])).tolist() == [1, 0]

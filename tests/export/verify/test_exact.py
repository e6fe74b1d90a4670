"""The reference of the verification: whole rows in float64, and what an engine may differ from it by."""

import copy

import numpy as np
import pytest
import torch

from bonnx.export.precision.quantize import quantized
from bonnx.export.verify.draws import expected_token
from bonnx.export.verify.exact import FACTOR, Exact, Tolerances
from bonnx.models import build
from bonnx.runtime.artifact.manifest import PRECISIONS, Scoring
from bonnx.runtime.generate.options import CheckedOptions


def test_layer_by_layer_is_the_whole_model_in_double_precision(language_model, rng, monkeypatch):
    batches = [rng.integers(0, 130, shape) for shape in ((1, 1), (3, 7), (2, 19))]
    exact = Exact(language_model, Scoring(activation="sigmoid"))
    wide = copy.deepcopy(language_model).double()
    # Angles are rounded to float32 by definition, in transformers too.
    wide.network.rotaries = language_model.network.rotaries
    pairs, expected = [], []
    for rows, (outputs, own) in zip(batches, exact.rows(batches, Tolerances()), strict=True):
        with torch.no_grad():
            backbone, scores, logits = wide(torch.from_numpy(rows))
            near = language_model(torch.from_numpy(rows))
        assert torch.allclose(outputs.backbone, backbone, rtol=1e-12, atol=1e-12)
        assert torch.allclose(outputs.scores, scores[..., 0].sigmoid(), rtol=1e-12, atol=1e-12)
        assert torch.equal(own.backbone, near[0])
        pairs.append((outputs.backbone[0], own.backbone[0]))
        expected.append((logits[0], near[2][0]))
        assert np.allclose(exact.rounded_logits(rows[0], slice(1, None)), near[2][0, 1:], rtol=1e-5, atol=1e-5)
    # However many are computed at a time.
    monkeypatch.setattr("bonnx.export.verify.exact._LOGITS", int(rng.integers(5200)))
    for (logits, near), (wide_logits, narrow) in zip(expected, exact.logits(pairs), strict=True):
        assert np.allclose(wide_logits, logits, rtol=1e-12, atol=1e-12)
        assert np.allclose(narrow, near, rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in language_model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_error_of_a_precision_is_its_arithmetics(precision, rng):
    torch.manual_seed(int(rng.integers(2**31)))
    network = build(embed_dim=24, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, scorer_hidden=16).eval()
    twin, tolerances = quantized(network, precision), Tolerances()
    rows = rng.standard_normal((16, 9, 24), np.float32)
    ((exact, _),) = Exact(twin, Scoring()).rows([rows], tolerances)
    with torch.no_grad():
        own = (twin(torch.from_numpy(rows))[1][..., 0] - exact.scores).abs().max().item()
    if precision == "fp16":
        # Products that round to float16 err by its 11 bits, and the weights' rounding is no error.
        assert 1e-5 < tolerances.errors["scores"] < 1e-2
        assert own < 1e-5
    else:
        assert tolerances.errors["scores"] == pytest.approx(own)
        # An input on the border between two of the 8-bit steps falls on either side; that alone can be seen.
        assert tolerances.errors["scores"] < (1e-5 if precision in ("fp32", "bf16") else 0.3)


def test_an_engine_may_err_a_few_times_as_pytorch_does():
    tolerances = Tolerances()
    tolerances.update("scores", np.array([1.0, -26000.0]), np.array([1.0 + 1e-3, -26000.0 + 4e-3]))
    tolerances.update("scores", np.array([[2.0]]), np.array([[2.0]]))
    assert tolerances.allowed("scores") == pytest.approx(FACTOR * max(4e-3, 26000 * 2.0**-23))
    tolerances.update("backbone", np.array([8.0]), np.array([8.0]))
    assert tolerances.allowed("backbone") == pytest.approx(8 * 8 * 2.0**-23)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.9)]
)
def test_any_token_may_be_drawn_from_no_distribution(wrong, temperature, top_k, top_p):
    options = CheckedOptions(1, 1, temperature, top_k, top_p, 0, (), "last", 0, 0.5)
    assert expected_token(np.array([0.5, wrong, 1.0]), 0.3, options) == (0, 0)


@pytest.mark.parametrize("top_p", [1.0, 0.999])
def test_a_draw_between_two_tokens_as_likely_as_each_other_is_undecided(top_p):
    """With top_k or top_p the shares lie in the order of the logits, and rounding may swap two of them."""
    logits = np.array([0.0, 1.0, 1.0 + 1e-7, 3.0, -2.0])
    by_likelihood = top_p < 1
    options = CheckedOptions(1, 1, 1.0, 0, top_p, 0, (), "last", 0, 0.5)
    order = np.argsort(-logits) if by_likelihood else np.arange(5)
    likely = np.exp(logits - 3)
    shares = likely[order] / likely.sum()
    # The middle of the share of the second and of the third most likely token.
    for place in np.flatnonzero(np.isin(order, (1, 2))):
        token, margin = expected_token(logits, shares[:place].sum() + shares[place] / 2, options)
        assert token == order[place]
        assert (margin < 1e-6) == by_likelihood
    if by_likelihood:
        _, margin = expected_token(logits, 0.3, options)
        assert margin > 1e-3

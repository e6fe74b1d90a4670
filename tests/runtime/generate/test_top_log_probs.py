"""The most likely tokens at each place, beside the one that was drawn."""

import numpy as np
import pytest

from bonnx import InputError
from bonnx.runtime.generate.continuous import most_likely
from tests.tolerance import RUNTIME, within

OPTIONS = {"n": 5, "max_new_tokens": 9, "seed": 4}


def test_the_drawn_token_has_its_log_probability_among_them(babbler, rng):
    prompt = rng.integers(0, 130, 7)
    plain = babbler.generate(prompt, **OPTIONS)
    result = babbler.generate(prompt, top_log_probs=20, **OPTIONS)
    assert all(candidate.top_tokens is None for candidate in plain.candidates)
    assert [c.tokens.tolist() for c in result.candidates] == [c.tokens.tolist() for c in plain.candidates]
    for candidate in result.candidates:
        assert candidate.top_tokens.shape == candidate.top_log_probs.shape == (len(candidate.tokens), 20)
        assert (np.diff(candidate.top_log_probs) <= 0).all()
        assert (np.exp(candidate.top_log_probs).sum(-1) < 1.0001).all()
        places, ranks = np.nonzero(candidate.top_tokens == candidate.tokens[:, None])
        assert within(candidate.top_log_probs[places, ranks], candidate.log_probs[places], RUNTIME)
        assert candidate.to_dict()["top_tokens"] == candidate.top_tokens.tolist()


def test_greedy_tokens_are_the_most_likely(babbler, rng):
    prompt = rng.integers(0, 130, 7)
    (candidate,) = babbler.generate(prompt, n=1, temperature=0, max_new_tokens=6, top_log_probs=1).candidates
    assert candidate.top_tokens[:, 0].tolist() == candidate.tokens.tolist()
    assert within(candidate.top_log_probs[:, 0], candidate.log_probs, RUNTIME)


def test_pruned_candidates_have_theirs_too(babbler):
    result = babbler.generate([1, 2], top_log_probs=2, prune_every=2, n=6, max_new_tokens=7)
    assert {len(candidate.tokens) for candidate in result.candidates} > {7}
    assert all(len(candidate.top_tokens) == len(candidate.tokens) for candidate in result.candidates)


def test_distributions(rng):
    logits = rng.normal(size=(3, 50)).astype(np.float32) * 5
    tokens, log_probs = most_likely(logits, 4)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    assert tokens.tolist() == np.argsort(-logits)[:, :4].tolist()
    assert within(log_probs, np.take_along_axis(expected, tokens, -1), RUNTIME)
    assert most_likely(logits[:, :2], 20)[0].shape == (3, 2)
    assert np.isnan(most_likely(np.full((1, 3), np.inf, np.float32), 2)[1]).all()


@pytest.mark.parametrize("count", [-1, 21, 1.5, True, "2"])
def test_numbers_that_cannot_be(babbler, count):
    with pytest.raises(InputError, match="top_log_probs: expected"):
        babbler.generate([1], top_log_probs=count)

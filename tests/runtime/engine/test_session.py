"""Values that are bound to a device, as on CUDA: here the device is the CPU, and the results are the same."""

import numpy as np
import pytest

from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.generate.decoding import decode_all
from bonnx.runtime.generate.request import read_request
from bonnx.runtime.generate.run import run_together
from bonnx.runtime.rank.request import read_request as read_rank_request
from bonnx.runtime.rank.run import run_together as rank_together


@pytest.fixture(params=[frozenset(), frozenset({"prompt_hash", "stream", "numbers", "temperature"})])
def engines(request, tiny, monkeypatch):
    """The same artifact twice; the second binds inputs and outputs, some of them on the host."""
    plain, bound = open_engine(tiny), open_engine(tiny)
    for name in bound.manifest.graphs:
        session = bound.session(name)
        monkeypatch.setattr(session, "_device", ("cpu", 0))
        monkeypatch.setattr(session, "_on_host", request.param)
    return plain, bound


def test_generations(engines, rng):
    prompt = rng.integers(0, 100, 9)
    options = {"n": 5, "max_new_tokens": 12, "seed": int(rng.integers(2**40)), "top_k": int(rng.choice([0, 7]))}
    found = []
    for engine in engines:
        request = read_request(engine, prompt, options)
        (whole,) = run_together(engine, [request])
        *_, grown = decode_all(engine, request.prompt, request.options, None, None)
        found.append((whole, grown))
    (whole, grown), (bound_whole, bound_grown) = found
    assert [c.tokens.tolist() for c in whole.candidates] == [c.tokens.tolist() for c in bound_whole.candidates]
    assert np.array_equal(grown.tokens, bound_grown.tokens)
    assert np.array_equal(grown.scores, bound_grown.scores, equal_nan=True)


def test_rankings(engines, rng):
    prompt, candidates = rng.integers(0, 100, 6), [rng.integers(0, 100, int(n)) for n in rng.integers(1, 9, 4)]
    plain, bound = (rank_together(engine, [read_rank_request(engine, prompt, candidates)])[0] for engine in engines)
    assert np.array_equal(plain.candidate_scores, bound.candidate_scores)

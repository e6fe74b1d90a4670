"""Many clients whose prompts begin alike: each gets what it gets alone, and the beginning is computed once."""

import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

import bonnx
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.engine.session import Session
from bonnx.runtime.serve import Settings
from tests.runtime.serve.servers import served
from tests.tolerance import RUNTIME, within

BEGINNING = 160


def draw_bodies(rng, count):
    beginning = rng.integers(0, 130, BEGINNING)
    bodies = []
    for _ in range(count):
        prompt = np.concatenate([beginning, rng.integers(0, 130, rng.integers(1, 40))])
        candidates = [rng.integers(0, 130, rng.integers(1, 15)).tolist() for _ in range(rng.integers(1, 5))]
        bodies.append({"prompt": prompt.tolist(), "candidates": candidates})
    return bodies


@pytest.mark.parametrize("kept", [512 * 2**20, 0])
def test_prompts_that_begin_alike(tiny, rng, monkeypatch, kept):
    read, values = [], Session.values

    def note(self, feeds, **more):
        read.append(feeds["prompt_ids"].shape[1] if "prompt_ids" in feeds else 0)
        return values(self, feeds, **more)

    monkeypatch.setattr(Session, "values", note)
    model, bodies = bonnx.load(tiny, prompt_cache=0), draw_bodies(rng, 48)
    with (
        served(open_engine(tiny, prompt_cache=kept), Settings(prompt_cache=kept)) as url,
        ThreadPoolExecutor(24) as pool,
    ):
        answers = [*pool.map(lambda body: httpx.post(f"{url}/v1/best-of-n", json=body, timeout=60), bodies)]
        metrics = httpx.get(f"{url}/metrics", timeout=60).text
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200, answer.text
        expected, found = model.rank(body["prompt"], body["candidates"]), answer.json()
        assert within([c["score"] for c in found["candidates"]], expected.candidate_scores, RUNTIME)
        assert found["best_index"] == expected.best_index
        tokens = sum(map(len, body["candidates"]))
        assert found["usage"]["prompt_tokens"] == len(body["prompt"]) + tokens
    if kept:
        assert max(read) == BEGINNING
        assert read.count(BEGINNING) == 1
    else:
        assert not read
    computed = float(re.search(r'bonnx_padded_tokens_total\{batcher="rank"\} (\S+)', metrics)[1])
    alone = sum(len(body["prompt"]) + sum(map(len, body["candidates"])) for body in bodies)
    assert (computed < alone / 2) == (kept > 0)

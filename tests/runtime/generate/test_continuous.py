"""Generations that join and leave a batch at any token, against each by itself in one run of `generate`."""

from types import SimpleNamespace

import numpy as np
import pytest

from bonnx.errors import ArtifactError
from bonnx.runtime.artifact.manifest import Value
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.generate.continuous import ContinuousBatch
from bonnx.runtime.generate.decoding import open_rows
from bonnx.runtime.generate.growing import LENGTH, PRUNED, STOP
from bonnx.runtime.generate.prompts import Joining, read_prompts
from bonnx.runtime.generate.request import read_request
from bonnx.runtime.generate.rows import GrownRows
from bonnx.runtime.generate.run import run_together
from tests.tolerance import RUNTIME, within

PROMPTS = ["3,7,20,24>1:", "13,14,2,6>26:", "5,6,7>42:", "4,9,13>43:", "3,7,12,25>98:", "1,2>3:"]


@pytest.fixture(scope="module")
def engine(countdown):
    return open_engine(countdown)


def draw_request(engine, rng):
    options = {"n": int(rng.choice([1, 1, 2, 3, 5])), "seed": int(rng.integers(-(2**63), 2**63 - 1))}
    options |= {"temperature": float(rng.choice([0, 0.7, 1.0, 1.4])), "top_k": int(rng.choice([0, 0, 4]))}
    options |= {"top_p": float(rng.choice([1, 0.8])), "max_new_tokens": int(rng.integers(1, 25))}
    options |= {"aggregation": str(rng.choice(["last", "step_min", "mean"]))}
    if rng.random() < 0.3:
        options |= {"prune_every": int(rng.integers(2, 7)), "prune_keep": float(rng.choice([0.4, 0.6]))}
    if rng.random() < 0.4:
        options["stop"] = [[";"], ["="], []][rng.integers(3)]
    return read_request(engine, str(rng.choice(PROMPTS)), options)


def read(engine, requests, rng):
    """Read prompts, together or in pieces."""
    session, joining = engine.session("prefill"), [Joining(r.prompt, r.options) for r in requests]
    if len(joining) == 1:
        while joining[0].read < len(joining[0].prompt) - 1 and rng.random() < 0.6:
            count = int(rng.integers(1, len(joining[0].prompt) - joining[0].read))
            assert read_prompts(session, joining, count) == []
    return joining, read_prompts(session, joining)


def twins_were_pruned(request, generation):
    """Whether two candidates had the same tokens when some were dropped: rounding decides which of them stays."""
    every, tokens = request.options.prune_every, [candidate.tokens.tolist() for candidate in generation.candidates]
    for length in range(every, request.options.max_new_tokens + 1, every or 1):
        begun = [tuple(row[:length]) for row in tokens if len(row) >= length]
        if len({*begun}) < len(begun):
            return True
    return False


def check_as_alone(engine, request, growing):
    (alone,) = run_together(engine, [request])
    if request.options.prune_every and twins_were_pruned(request, alone):
        return
    scores, best = growing.select()
    for i, candidate in enumerate(alone.candidates):
        length = growing.lengths[i]
        assert growing.tokens[i, :length].tolist() == candidate.tokens.tolist()
        assert within(growing.scores[i, :length], candidate.scores, RUNTIME)
        assert within(growing.log_probs[i, :length], candidate.log_probs, RUNTIME)
        assert growing.reasons[i] == ["length", "stop", "pruned"].index(candidate.finish_reason)
        assert (growing.reasons[i] == PRUNED) == np.isnan(scores[i])
    if best != alone.best_index:
        # Equal to rounding.
        assert within(scores[best], scores[alone.best_index], RUNTIME)


def play(engine, requests, rng, step=lambda batch: batch.step()):
    """Let generations grow in one batch, at random with others; some leave, the others are returned when they end."""
    batch = ContinuousBatch(open_rows(engine, requests[0].options), engine.manifest.scoring.step_token)
    waiting, running, ended, left = [*requests], {}, [], 0
    while waiting or running:
        while waiting and (not running or rng.random() < 0.4):
            group = [waiting.pop() for _ in range(min(len(waiting), int(rng.integers(1, 4))))]
            for request, joining, prompt in zip(group, *read(engine, group, rng), strict=True):
                running[batch.join(prompt, joining)] = request
        grown = step(batch)
        ended += [(running.pop(growing), growing) for growing in grown if (growing.reasons >= 0).all()]
        if running and rng.random() < 0.05:
            # A client leaves.
            growing = list(running)[rng.integers(len(running))]
            batch.leave(growing)
            del running[growing]
            left += 1
        assert batch.rows == sum(int((growing.reasons < 0).sum()) for growing in batch.generations)
    assert len(ended) + left == len(requests)
    assert batch.rows == 0
    return ended


@pytest.mark.parametrize("company", range(22))
def test_each_gets_what_it_gets_alone(engine, rng, company):
    for request, growing in play(engine, [draw_request(engine, rng) for _ in range(25)], rng):
        check_as_alone(engine, request, growing)


def test_padding_counts_what_is_computed_for_nothing(engine):
    batch = ContinuousBatch(GrownRows(engine.session("decode")), None)
    assert batch.padding(7, 3) == (0, 0)
    first = read_request(engine, PROMPTS[0], {"n": 4, "max_new_tokens": 9, "stop": []})
    (prompt,) = read_prompts(engine.session("prefill"), [joining := Joining(first.prompt, first.options)])
    batch.join(prompt, joining)
    for _ in range(3):
        batch.step()
    length = len(first.prompt)
    # A rectangle of two prompts, as long as the longer and with as many candidates as the one that has most.
    assert batch.padding(length + 5, 1) == (2 * (length + 5) * 4 - 4 * length - (length + 5), 3)


def test_a_snapshot_stays_as_it_was(engine):
    request = read_request(engine, PROMPTS[1], {"n": 3, "max_new_tokens": 40, "stop": []})
    (prompt,) = read_prompts(engine.session("prefill"), [joining := Joining(request.prompt, request.options)])
    batch = ContinuousBatch(GrownRows(engine.session("decode")), None)
    growing = batch.join(prompt, joining)
    states = []
    while batch.rows:
        batch.step()
        states.append(growing.snapshot())
    assert len(states) == 40
    for i, state in enumerate(states):
        assert state.tokens.tolist() == growing.tokens[:, : i + 1].tolist()
        assert state.lengths.tolist() == [i + 1] * 3
        assert state.reasons.tolist() == ([LENGTH] if i == 39 else [-1]) * 3
    assert STOP not in growing.reasons


def test_an_older_graph_is_refused():
    session = SimpleNamespace(graph=SimpleNamespace(inputs=[Value(name="tokens", dtype="int64", shape=["n", "b"])]))
    with pytest.raises(ArtifactError, match=r"earlier version of bonnx.*export the model again"):
        GrownRows(session)

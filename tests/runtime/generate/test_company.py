"""Requests that differ in every option run together, and each gets what it gets alone."""

import msgspec
import numpy as np
import pytest

from bonnx import InputError
from bonnx.models.countdown.vocabulary import END, STEP
from bonnx.runtime.artifact.manifest import AGGREGATIONS
from bonnx.runtime.batching import plan
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.generate.decoding import generate_feeds
from bonnx.runtime.generate.request import read_request
from bonnx.runtime.generate.run import run_together
from bonnx.runtime.selection.aggregate import aggregate_tokens
from bonnx.runtime.text.padding import pad
from tests.tolerance import RUNTIME, within


@pytest.fixture(scope="module", params=["countdown", "tiny"])
def engine(request):
    return open_engine(request.getfixturevalue(request.param))


def drawn_request(engine, rng):
    """A puzzle, or ids where there is no tokenizer, with every option drawn at random."""
    prompt = rng.integers(0, 130, int(rng.integers(1, 20)))
    if engine.reader.tokenizer is not None:
        prompt = ",".join(map(str, rng.integers(1, 30, int(rng.integers(2, 5))))) + f">{rng.integers(1, 100)}:"
    options = {
        "n": int(rng.integers(1, 9)),
        "max_new_tokens": int(rng.integers(1, 40)),
        "temperature": float(rng.choice([0.0, 0.5, 1.0, 1.0, 1.5])),
        "top_k": int(rng.choice([0, 0, 3, 40])),
        "top_p": float(rng.choice([1.0, 1.0, 0.9, 0.5])),
        "seed": int(rng.integers(-(2**63), 2**63 - 1)),
        "aggregation": str(rng.choice(["", "step_"])) + str(rng.choice(AGGREGATIONS)),
        "prune_every": int(rng.choice([0, 0, 3, 8])),
        "prune_keep": float(rng.choice([0.3, 0.5, 0.8])),
    }
    if rng.random() < 0.5:
        ends = [END, STEP, 5, 7, 12] if engine.reader.tokenizer is not None else [5, 7, 12, 40, 99]
        options["stop"] = [int(token) for token in rng.choice(ends, int(rng.integers(0, 4)), replace=False)]
    return read_request(engine, prompt, options)


def is_close_race(engine, request, alone):
    """Whether rounding decides which of two candidates is pruned, as it does between equal ones."""
    options = request.options
    if not options.prune_every:
        return False
    width = max(len(c.tokens) for c in alone.candidates)
    tokens, scores = np.zeros((2, options.n, width))
    for row, score, candidate in zip(tokens, scores, alone.candidates, strict=True):
        row[: len(candidate.tokens)], score[: len(candidate.tokens)] = candidate.tokens, candidate.scores
    lengths = np.array([len(c.tokens) for c in alone.candidates])
    for position in range(options.prune_every, width + 1, options.prune_every):
        mask = np.arange(width) < np.minimum(lengths, position)[:, None]
        rule = engine.manifest.scoring.step_token, options.aggregation
        values, _ = aggregate_tokens(scores.astype(np.float32), mask, tokens.astype(np.int64), *rule)
        gone = [c.finish_reason == "pruned" and len(c.tokens) < position for c in alone.candidates]
        values = np.sort(values[~np.array(gone)])
        if (np.diff(values) <= 1e-4 * np.abs(values[1:]) + 1e-7).any():
            return True
    return False


def check_same(engine, request, found, alone):
    """The tokens exactly, the scores to rounding; of candidates whose scores are equal to rounding, any may win."""
    if is_close_race(engine, request, alone):
        # What is drawn does not depend on who is pruned, only how far it gets.
        for a, b in zip(found.candidates, alone.candidates, strict=True):
            length = min(len(a.tokens), len(b.tokens))
            assert a.tokens[:length].tolist() == b.tokens[:length].tolist()
        return
    assert [c.tokens.tolist() for c in found.candidates] == [c.tokens.tolist() for c in alone.candidates]
    assert [c.finish_reason for c in found.candidates] == [c.finish_reason for c in alone.candidates]
    assert [c.text for c in found.candidates] == [c.text for c in alone.candidates]
    for a, b in zip(found.candidates, alone.candidates, strict=True):
        assert within(a.scores, b.scores, RUNTIME)
        assert within(a.log_probs, b.log_probs, RUNTIME)
        assert np.isnan(a.score) == np.isnan(b.score)
        assert np.isnan(a.score) or within(a.score, b.score, RUNTIME)
    assert (found.best_index < 0) == (alone.best_index < 0)
    if found.best_index != alone.best_index:
        assert within(found.candidates[found.best_index].score, alone.best.score, RUNTIME)
    assert (found.prompt_tokens, found.computed_tokens) == (alone.prompt_tokens, alone.computed_tokens)
    assert found.aggregation == alone.aggregation


@pytest.mark.parametrize("size", [2, 5, 17])
def test_in_company_as_alone(engine, size, rng):
    requests = [drawn_request(engine, rng) for _ in range(size)]
    assert plan(requests, lambda slots, shape: True, lambda slots, shape: 1.0) == [[*range(size)]]
    for request, found in zip(requests, run_together(engine, requests), strict=True):
        (alone,) = run_together(engine, [request])
        check_same(engine, request, found, alone)


def test_a_candidate_that_a_prompt_does_not_have(engine, rng):
    """The outputs are as large as the largest request needs: beyond a prompt's own number there is nothing."""
    requests = [read_request(engine, [3, 7, 5], {"n": n, "max_new_tokens": 2 * n, "seed": n}) for n in (2, 6, 1)]
    prompts, mask = pad([request.prompt for request in requests], 0)
    feeds = generate_feeds(prompts, mask, [request.options for request in requests], None)
    session = engine.session("generate")
    names = [value.name for value in session.graph.outputs]
    outputs = dict(zip(names, session.run(feeds, names), strict=True))
    exists = np.arange(6)[:, None] < [2, 6, 1]
    assert ((outputs["lengths"] > 0) == exists).all()
    assert ((outputs["finish_reasons"] >= 0) == exists).all()
    assert np.array_equal(np.isnan(outputs["candidate_scores"]), ~exists)
    assert (outputs["lengths"] <= [4, 12, 2]).all()
    assert not outputs["scores"][~exists].any()


def test_a_prompt_that_may_have_no_token(engine):
    """From the first token on, there are fewer rows than candidates."""
    requests = [read_request(engine, [3, 7, 5], {"n": n, "max_new_tokens": 5, "seed": n}) for n in (2, 6)]
    prompts, mask = pad([request.prompt for request in requests], 0)
    feeds = generate_feeds(prompts, mask, [request.options for request in requests], None)
    session = engine.session("generate")
    whole, none = (
        session.run({**feeds, "max_new_tokens": np.array([5, last])}, ["sequences", "lengths"]) for last in (5, 0)
    )
    assert not none[1][:, 1].any()
    assert np.array_equal(none[1][:, 0], whole[1][:, 0])
    assert np.array_equal(none[0][:2, 0], whole[0][:2, 0, : none[0].shape[2]])


def test_options_for_other_than_the_number_of_prompts_are_refused(engine):
    request = read_request(engine, [3, 7, 5], {"n": 2, "max_new_tokens": 3})
    prompts, mask = pad([request.prompt] * 2, 0)
    feeds = generate_feeds(prompts, mask, [request.options] * 2, None)
    for name in engine.manifest.graphs["generate"].per_prompt:
        for shape in ((3,), (2, 2)):
            wrong = {name: np.broadcast_to(feeds[name], shape)}
            with pytest.raises(Exception, match=r"Expand|Reshape|expand shape|broadcast an axis|Concat"):
                engine.session("generate").run(feeds | wrong, ["lengths"])


def test_an_older_artifact_joins_equal_options_only(engine, monkeypatch, rng):
    """Its graphs take one value of each option for all prompts, which is what they get."""
    graphs = {name: msgspec.structs.replace(graph, per_prompt=[]) for name, graph in engine.manifest.graphs.items()}
    monkeypatch.setattr(engine, "manifest", msgspec.structs.replace(engine.manifest, graphs=graphs))
    options = {"n": 2, "max_new_tokens": 9}
    requests = [read_request(engine, [3, 7, 5 + i], options | {"seed": seed}) for i, seed in enumerate((1, 1, 2))]
    assert plan(requests, lambda slots, shape: True, lambda slots, shape: 1.0) == [[0, 1], [2]]
    prompts, mask = pad([request.prompt for request in requests[:2]], 0)
    feeds = generate_feeds(prompts, mask, [request.options for request in requests[:2]], None)
    assert all(feeds[name].shape == () for name in ("seed", "num_candidates", "temperature", "prune_keep"))


def test_a_stop_text_of_several_tokens_runs_alone(countdown):
    engine = open_engine(countdown)
    assert read_request(engine, "3,7>10:", {"stop": ["3+7"]}).key is None
    with pytest.raises(InputError, match="n: expected"):
        read_request(engine, "3,7>10:", {"n": 0})

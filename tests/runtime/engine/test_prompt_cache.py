"""`prepare`: prompts that are read ahead, continued, cut and evicted give the scores of `rank`."""

import threading

import numpy as np
import pytest

import bonnx
from bonnx.errors import InputError
from bonnx.runtime.engine import prompt_cache
from tests.tolerance import RUNTIME, within

CANDIDATES = ["24-20=4;7-4=3;3/3=1;", "24/3=8;20-7=13;13-8=1;", "7"]
PROMPT = "3,7,20,24>1:"


@pytest.fixture
def model(countdown):
    return bonnx.load(countdown)


@pytest.fixture
def reads(model, monkeypatch):
    """The graphs that a model runs, and how many tokens of a prompt each reads."""
    runs, pool = [], model._engine.session

    class Noted:
        def __init__(self, name):
            self.name, self.session = name, pool(name)

        def __getattr__(self, name):
            return getattr(self.session, name)

        def run(self, feeds, *rest):
            runs.append((self.name, feeds["prompt_ids"].shape[1]))
            return self.session.run(feeds, *rest)

        def values(self, feeds, **options):
            runs.append((self.name, feeds["prompt_ids"].shape[1] if "prompt_ids" in feeds else 0))
            return self.session.values(feeds, **options)

    monkeypatch.setattr(model._engine, "session", Noted)
    monkeypatch.setattr(model._engine.prompts, "_session", Noted)
    return runs


def draw(rng, length):
    return rng.integers(0, 1000, length)


def test_after_a_prepared_prompt_only_candidates_are_read(model, reads):
    plain = model.rank(PROMPT, CANDIDATES, vote="weighted", answers=["a", "b", "a"], aggregation="min")
    assert [name for name, _ in reads] == ["rank"]
    reads.clear()
    assert model.prepare(PROMPT) is True
    assert [name for name, _ in reads] == ["rank_prefill"]
    reads.clear()
    cached = model.rank(PROMPT, CANDIDATES, vote="weighted", answers=["a", "b", "a"], aggregation="min")
    assert reads == [("rank_cached", 0)]
    assert cached.best_index == plain.best_index
    assert cached.order == plain.order
    assert within(cached.candidate_scores, plain.candidate_scores, RUNTIME)
    assert within(cached.group_scores, plain.group_scores, RUNTIME)
    for ours, theirs in zip(cached.scores, plain.scores, strict=True):
        assert within(ours, theirs, RUNTIME)


def test_a_conversation_continues_where_its_last_turn_ended(model, reads, rng):
    first, second = draw(rng, 20), draw(rng, 15)
    turn = np.concatenate([first, second])
    candidates = [draw(rng, length) for length in (1, 5, 9)]
    plain = model.rank(turn, candidates)
    reads.clear()
    model.prepare(first)
    model.prepare(turn)
    assert [tokens for _, tokens in reads] == [20, 15]
    assert within(model.rank(turn, candidates).candidate_scores, plain.candidate_scores, RUNTIME)
    # The first turn is part of the second, and kept once.
    assert model._engine.prompts.size == model._engine.prompts._bytes(35)


def test_a_prompt_that_differs_at_its_end_is_read_from_there(model, reads, rng):
    common, mine, other = draw(rng, 30), draw(rng, 7), draw(rng, 9)
    other[0] = (mine[0] + 1) % 1000
    candidates = [draw(rng, 3), draw(rng, 8)]
    prompts = [np.concatenate([common, end]) for end in (mine, other)]
    plain = model.rank(prompts[1], candidates)
    model.prepare(prompts[0])
    reads.clear()
    assert within(model.rank(prompts[1], candidates).candidate_scores, plain.candidate_scores, RUNTIME)
    assert reads == [("rank_prefill", 9), ("rank_cached", 0)]
    # Both are kept.
    reads.clear()
    for prompt in prompts:
        model.rank(prompt, candidates)
    assert reads == [("rank_cached", 0)] * 2


def test_a_prompt_of_which_little_is_known_is_ranked_in_one_run(model, reads, rng):
    common = draw(rng, 10)
    model.prepare(common)
    reads.clear()
    model.rank(np.concatenate([common, draw(rng, 30)]), [draw(rng, 3)])
    assert reads == [("rank", 40)]


def test_a_long_prompt_is_read_in_pieces(model, reads, rng, monkeypatch):
    monkeypatch.setattr(prompt_cache, "_PIECE", 16)
    prompt, candidates = draw(rng, 40), [draw(rng, 5), draw(rng, 2)]
    plain = model.rank(prompt, candidates)
    reads.clear()
    model.prepare(prompt)
    assert [tokens for _, tokens in reads] == [16, 16, 8]
    assert within(model.rank(prompt, candidates).candidate_scores, plain.candidate_scores, RUNTIME)


def test_the_prompts_used_last_stay_within_the_bytes(countdown, rng):
    one = bonnx.load(countdown)._engine.prompts._bytes(20)
    model = bonnx.load(countdown, prompt_cache=2 * one)
    prompts, candidates = [draw(rng, 20) for _ in range(3)], [draw(rng, 3)]
    for prompt in prompts[:2]:
        assert model.prepare(prompt)
    model.rank(prompts[0], candidates)
    model.prepare(prompts[2])
    covered = [model._engine.prompts.covers(prompt) for prompt in prompts]
    assert covered == [True, False, True]
    assert model._engine.prompts.size == 2 * one
    model.close()
    assert model._engine.prompts.size == 0


def test_a_prompt_that_does_not_fit_is_not_kept(countdown, rng):
    model = bonnx.load(countdown, prompt_cache=0)
    assert model.prepare(PROMPT) is False
    assert model.rank(PROMPT, CANDIDATES).best_index == 0


@pytest.mark.parametrize("prompt", ["", [], 3, [10**6], None], ids=repr)
def test_an_invalid_prompt_is_refused(model, prompt):
    with pytest.raises(InputError, match="prompt"):
        model.prepare(prompt)


def test_a_prompt_beyond_the_limit_is_refused(model, rng):
    with pytest.raises(InputError, match="at most"):
        model.prepare(draw(rng, model.manifest.limits.max_tokens))


@pytest.mark.parametrize("value", [-1, 1.5, True, "1"], ids=repr)
def test_the_size_is_a_whole_number(countdown, value):
    with pytest.raises(InputError, match="prompt_cache"):
        bonnx.load(countdown, prompt_cache=value)


def test_threads_wait_for_a_prompt_that_one_of_them_reads(model, reads, rng):
    prompt, candidates = draw(rng, 40), [draw(rng, 3), draw(rng, 4)]
    plain, begun = model.rank(prompt, candidates), threading.Event()
    session = model._engine.session("rank_prefill")
    reads.clear()

    class Slow:
        graph, hold = session.graph, session.hold

        def values(self, feeds, **options):
            begun.set()
            go.wait()
            return session.values(feeds, **options)

    go = threading.Event()
    model._engine.prompts._session = lambda name: Slow()
    results = []
    reading = threading.Thread(target=lambda: model.prepare(prompt))
    ranking = [
        threading.Thread(target=lambda: results.append(model.rank(prompt, candidates).candidate_scores))
        for _ in range(3)
    ]
    reading.start()
    begun.wait()
    for thread in ranking:
        thread.start()
    go.set()
    for thread in (reading, *ranking):
        thread.join()
    assert sorted(name for name, _ in reads) == ["rank_cached"] * 3 + ["rank_prefill"]
    assert all(within(scores, plain.candidate_scores, RUNTIME) for scores in results)


def test_a_reading_that_fails_leaves_nothing_behind(model, rng):
    prompt, prompts = draw(rng, 30), model._engine.prompts
    session = model._engine.session("rank_prefill")

    class Failing:
        graph, hold = session.graph, session.hold

        def values(self, feeds, **options):
            raise RuntimeError("no memory")

    prompts._session = lambda name: Failing()
    with pytest.raises(RuntimeError):
        model.prepare(prompt)
    assert not prompts.covers(prompt)
    assert prompts.size == 0


def test_embeddings_too(small, rng):
    model = bonnx.load(small)
    prompt, candidates = rng.standard_normal((9, 12), np.float32), [rng.standard_normal((4, 12), np.float32)] * 2
    plain = model.rank(prompt, candidates)
    assert model.prepare(prompt)
    assert within(model.rank(prompt, candidates).candidate_scores, plain.candidate_scores, RUNTIME)


def test_an_array_that_the_caller_fills_anew_is_another_prompt(small, rng):
    model = bonnx.load(small)
    buffer, candidates = rng.standard_normal((9, 12), np.float32), [rng.standard_normal((4, 12), np.float32)] * 2
    model.prepare(buffer)
    buffer[:] = rng.standard_normal((9, 12), np.float32)
    plain = bonnx.load(small, prompt_cache=0).rank(buffer, candidates)
    assert within(model.rank(buffer, candidates).candidate_scores, plain.candidate_scores, RUNTIME)

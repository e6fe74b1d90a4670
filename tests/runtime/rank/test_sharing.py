"""Prompts that begin alike share that beginning; each request gets what it gets alone."""

import numpy as np
import pytest

import bonnx
from bonnx.runtime.batching import CALL_TOKENS
from bonnx.runtime.engine.beginnings import BLOCK
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.engine.session import Session
from bonnx.runtime.rank.request import read_request
from bonnx.runtime.rank.run import rank_all, run_together
from tests.runtime.test_batching import check_same

LEAST = 4 * CALL_TOKENS["cpu"]
RULES = ["last", "mean", "min", "max", "prod", "step_last", "step_mean", "step_min"]


@pytest.fixture
def sharing(tiny):
    """An engine that has ranked nothing yet."""
    return open_engine(tiny)


@pytest.fixture(scope="module")
def plain(tiny):
    """The model that keeps nothing."""
    return bonnx.load(tiny, prompt_cache=0)


@pytest.fixture
def runs(monkeypatch):
    """The graphs that are run, and how many tokens of a prompt and candidates each reads."""
    found, run, values = [], Session.run, Session.values

    def note(session, feeds):
        name = session.graph.file.rpartition("/")[2].partition(".")[0]
        found.append(
            (name, feeds["prompt_ids"].size if "prompt_ids" in feeds else 0, len(feeds.get("candidate_ids", ())))
        )

    monkeypatch.setattr(Session, "run", lambda self, feeds, *more: note(self, feeds) or run(self, feeds, *more))
    monkeypatch.setattr(Session, "values", lambda self, feeds, **more: note(self, feeds) or values(self, feeds, **more))
    return found


def draw(rng, length):
    return rng.integers(0, 30, length)


def draw_requests(rng, count):
    """Requests whose prompts begin with one of two texts, or with a longer text that begins with one of these."""
    beginnings = [draw(rng, rng.integers(LEAST, 2 * LEAST)) for _ in range(2)]
    beginnings.append(np.concatenate([beginnings[0], draw(rng, LEAST + BLOCK)]))
    requests = []
    for _ in range(count):
        kind = rng.integers(4)
        first = draw(rng, 20) if kind == 3 else beginnings[kind]
        prompt = np.concatenate([first, draw(rng, rng.integers(0, 50))])
        n = int(rng.integers(1, 6))
        candidates = [draw(rng, rng.integers(0 if i else 1, 12)) for i in range(n)]
        options = {"aggregation": str(rng.choice(RULES))}
        if rng.random() < 0.4:
            options["vote"] = str(rng.choice(["weighted", "majority"]))
            options["answers"] = [None if a == 3 else int(a) for a in rng.integers(0, 4, n)]
        if options["aggregation"].startswith("step") and rng.random() < 0.5:
            options["step_masks"] = [rng.integers(0, 2, len(c)).tolist() for c in candidates]
        requests.append((prompt, candidates, options))
    return requests


def alone(model, request):
    prompt, candidates, options = request
    try:
        return model.rank(prompt, candidates, **options)
    except bonnx.NoWinnerError as e:
        return e


def test_random_requests_in_random_company_get_what_they_get_alone(sharing, plain, rng):
    requests, kept = draw_requests(rng, 60), set()
    while requests:
        now, requests = requests[: rng.integers(1, 20)], requests[20:]
        jobs = [read_request(sharing, prompt, items, **options, share=True) for prompt, items, options in now]
        kept |= {(job.kept > 0, job.kept == len(job.prompt)) for job in jobs}
        for job, (prompt, items, _) in zip(jobs, now, strict=True):
            assert job.sent == (len(items), len(prompt), max(map(len, items)), 0)
            assert job.sent_tokens == len(prompt) + sum(map(len, items))
        for found, request in zip(rank_all(sharing, jobs), now, strict=True):
            expected = alone(plain, request)
            check_same(found, expected)
            assert getattr(found, "unreadable", None) == getattr(expected, "unreadable", None)
    # Nothing in common, all in common, and a rest of its own.
    assert {(False, False), (True, True)} <= kept


def test_embeddings_and_scores_that_are_nan(small, rng, monkeypatch):
    monkeypatch.setitem(CALL_TOKENS, "cpu", BLOCK // 4)
    engine, plain = open_engine(small), bonnx.load(small, prompt_cache=0)
    draw = lambda count: rng.standard_normal((count, 12)).astype(np.float32)  # noqa: E731
    beginning, jobs, expected = draw(BLOCK), [], []
    for i in range(12):
        prompt, candidates = np.concatenate([beginning, draw(rng.integers(1, 5))]), [draw(3), draw(5)]
        if i % 3 == 0:
            candidates[1][0, 0] = np.nan
        jobs.append(read_request(engine, prompt, candidates, share=True))
        expected.append(plain.rank(prompt, candidates))
    assert sum(job.kept > 0 for job in jobs) == 11
    for found, other in zip(rank_all(engine, jobs), expected, strict=True):
        check_same(found, other)


def test_a_beginning_is_read_once_and_the_rest_runs_together(sharing, rng, runs):
    beginning = draw(rng, 4 * LEAST // BLOCK * BLOCK)
    prompts = [np.concatenate([beginning, draw(rng, 10)]) for _ in range(9)]
    for i, prompt in enumerate(prompts):
        # Another token follows in each.
        prompt[len(beginning)] = i
    jobs = [read_request(sharing, prompt, [draw(rng, 6), draw(rng, 5)], share=True) for prompt in prompts]
    assert [job.kept for job in jobs] == [0, *[len(beginning)] * 8]
    rank_all(sharing, jobs)
    assert [run for run in runs if run[0] != "rank_prefill"] == [
        ("rank", len(beginning) + 10, 2),
        ("rank_cached", 0, 16),
    ]
    # In pieces of any size.
    assert sum(tokens for name, tokens, _ in runs if name == "rank_prefill") == len(beginning)
    runs.clear()
    run_together(sharing, [read_request(sharing, prompts[0], [draw(rng, 6)], share=True)])
    assert runs == [("rank_cached", 0, 1)]


def test_a_longer_rest_is_read_once_for_all_candidates(sharing, rng, runs):
    beginning, length = draw(rng, 4 * LEAST // BLOCK * BLOCK), CALL_TOKENS["cpu"]
    prompts = [np.concatenate([beginning, [i], draw(rng, length)]) for i in range(3)]
    candidates = [draw(rng, 6) for _ in range(4)]
    for prompt in prompts:
        run_together(sharing, [read_request(sharing, prompt, candidates, share=True)])
    # The second reads the beginning, the third only its own.
    assert runs[0][0] == "rank"
    assert runs[-2:] == [("rank_prefill", length + 1, 0), ("rank_cached", 0, 4)]
    # The rest is not kept.
    assert sharing.prompts.size == sharing.prompts._bytes(len(beginning))


def test_longer_rests_of_several_prompts_are_read_together(sharing, plain, rng, runs):
    beginning, call = draw(rng, 4 * LEAST // BLOCK * BLOCK), CALL_TOKENS["cpu"]
    # Two of one prompt are among them.
    rests = [np.concatenate([[i % 5], draw(rng, call - i % 5)]) for i in range(6)]
    rests[5] = rests[0]
    requests = [(np.concatenate([beginning, rest]), [draw(rng, 6) for _ in range(3)]) for rest in rests]
    for prompt, candidates in requests[:2]:
        run_together(sharing, [read_request(sharing, prompt, candidates, share=True)])
    runs.clear()
    jobs = [read_request(sharing, *request, share=True) for request in requests]
    for job, found, request in zip(jobs, rank_all(sharing, jobs), requests, strict=True):
        assert job.kept == len(beginning) < len(job.prompt)
        check_same(found, plain.rank(*request))
    ours = [run for run in runs if run[0] != "rank"]
    assert ours == [("rank_prefill", 5 * (call + 1), 0), ("rank_cached", 0, 6)]
    # As many copies of the beginning as the cache could hold.
    sharing.prompts._limit = 3 * sharing.prompts._bytes(len(jobs[0].prompt))
    runs.clear()
    rank_all(sharing, jobs)
    assert {tokens // call for name, tokens, _ in runs if name == "rank_prefill"} <= {1, 2, 3}
    assert len(runs) > 2


def test_prompts_that_share_little_are_left_alone(sharing, rng):
    beginning = draw(rng, LEAST)
    for _ in range(5):
        for prompt in (
            draw(rng, 2 * LEAST),
            np.concatenate([beginning, draw(rng, LEAST + 2 * BLOCK)]),
            beginning[:BLOCK],
        ):
            assert read_request(sharing, prompt, [draw(rng, 3)], share=True).kept == 0
    assert sharing.prompts.size == 0


def test_only_those_who_ask_share(sharing, rng):
    prompt = draw(rng, 3 * LEAST)
    assert not any(read_request(sharing, prompt, [draw(rng, 3)]).kept for _ in range(3))


def test_what_is_kept_stays_within_its_bytes(tiny, rng):
    one = open_engine(tiny).prompts._bytes(2 * LEAST)
    engine = open_engine(tiny, prompt_cache=2 * one)
    for _ in range(6):
        beginning = draw(rng, 2 * LEAST // BLOCK * BLOCK)
        for _ in range(3):
            prompt = np.concatenate([beginning, draw(rng, 5)])
            run_together(engine, [read_request(engine, prompt, [draw(rng, 3)], share=True)])
            assert engine.prompts.size <= 2 * one
    assert engine.prompts.size > 0
    nothing = open_engine(tiny, prompt_cache=0)
    assert not any(read_request(nothing, prompt, [draw(rng, 3)], share=True).kept for _ in range(3))


def test_a_prompt_that_was_prepared_is_continued_as_before(sharing, plain, rng):
    prompt, candidates = draw(rng, 3 * LEAST), [draw(rng, 4), draw(rng, 3)]
    model = bonnx.Model(sharing)
    assert model.prepare(prompt)
    request = read_request(sharing, prompt, candidates, share=True)
    assert (request.continues, request.beginning) == (True, 0)
    check_same(run_together(sharing, [request])[0], plain.rank(prompt, candidates))

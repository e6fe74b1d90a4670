"""Rankings that run together give what each gives by itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bonnx
from bonnx.runtime.batching import CALL_TOKENS, Shape, company, padded_tokens, plan
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.engine.session import Session
from bonnx.runtime.rank.request import read_request
from bonnx.runtime.rank.run import rank_all
from bonnx.runtime.selection.aggregate import aggregate, elect
from tests.tolerance import RUNTIME, within

RULES = ["last", "mean", "min", "max", "prod"]


def draw_requests(rng, embed_dim, count):
    prompts = [rng.standard_normal((rng.integers(1, 12), embed_dim)).astype(np.float32) for _ in range(4)]
    requests = []
    for _ in range(count):
        n = int(rng.integers(1, 6))
        candidates = [rng.standard_normal((rng.integers(1, 9), embed_dim)).astype(np.float32) for _ in range(n)]
        if rng.random() < 0.2:
            candidates[0][0, 0] = np.nan
        options = {"aggregation": str(rng.choice(RULES))}
        if rng.random() < 0.3:
            options["aggregation"] = "step_" + options["aggregation"]
            options["step_masks"] = [rng.integers(0, 2, len(c)) for c in candidates]
        if rng.random() < 0.5:
            options["vote"] = str(rng.choice(["weighted", "majority"]))
            options["answers"] = [None if a == 3 else int(a) for a in rng.integers(0, 4, n)]
        requests.append((prompts[rng.integers(4)], candidates, options))
    return requests


def close(found, expected):
    """Within rounding, and NaN in the same places."""
    lost = np.isnan(expected)
    assert (np.isnan(found) == lost).all()
    assert within(np.where(lost, 0, found), np.where(lost, 0, expected), RUNTIME)


def alone(model, request):
    prompt, candidates, options = request
    try:
        return model.rank(prompt, candidates, **options)
    except bonnx.NoWinnerError as e:
        return e


def check_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(found, bonnx.NoWinnerError):
        assert str(found) == str(expected)
        return
    close(found.candidate_scores, expected.candidate_scores)
    for a, b in zip(found.scores, expected.scores, strict=True):
        close(a, b)
    assert found.aggregation == expected.aggregation
    assert found.answers == expected.answers
    assert (found.group_scores is None) == (expected.group_scores is None)
    if found.group_scores is not None:
        close(found.group_scores, expected.group_scores)
    assert (found.step_scores is None) == (expected.step_scores is None)
    # Where two are within rounding of each other either may be first.
    leaders = expected.candidate_scores if expected.group_scores is None else expected.group_scores
    close(leaders[[*found.order]], leaders[[*expected.order]])
    assert found.best_index == found.order[0]


@pytest.mark.parametrize("tokens", [50, 2048])
def test_rankings_together_are_those_of_each(engine, model, rng, tokens):
    requests = draw_requests(rng, 12, 40)
    jobs = [read_request(engine, prompt, candidates, **options) for prompt, candidates, options in requests]
    for found, request in zip(rank_all(engine, jobs, tokens=tokens), requests, strict=True):
        check_same(found, alone(model, request))


def test_one_prompt_is_computed_once_for_many_rankings(engine, model, rng, monkeypatch):
    prompt = rng.standard_normal((9, 12)).astype(np.float32)
    requests = [[rng.standard_normal((5, 12)).astype(np.float32) for _ in range(rng.integers(1, 5))] for _ in range(8)]
    jobs = [
        read_request(engine, prompt, candidates, vote="weighted", answers=[i % 2 for i in range(len(candidates))])
        for candidates in requests
    ]
    expected = [model.rank(prompt, c, vote="weighted", answers=[i % 2 for i in range(len(c))]) for c in requests]
    runs, run = [], Session.run
    monkeypatch.setattr(Session, "run", lambda self, feeds, *more: runs.append(feeds) or run(self, feeds, *more))
    found = rank_all(engine, jobs)
    assert len(runs) == 1
    assert runs[0]["prompt_embeds"].shape == (1, 9, 12)
    for a, b in zip(found, expected, strict=True):
        check_same(a, b)


def test_text_together(countdown, rng):
    engine = open_engine(countdown)
    model = bonnx.Model(engine)
    prompts = ["3,7,20,24>1:", "13,14,2,6>26:", "5,6,7>42:"]
    requests = []
    for _ in range(12):
        steps = rng.integers(1, 60, (3, rng.integers(1, 4), 3))
        candidates = ["".join(f"{a}+{b}={c};" for a, b, c in candidate) for candidate in steps]
        requests.append((str(rng.choice(prompts)), candidates, {}))
    found = rank_all(engine, [read_request(engine, prompt, candidates) for prompt, candidates, _ in requests])
    for a, request in zip(found, requests, strict=True):
        check_same(a, alone(model, request))


def test_the_best_of_a_shared_slot_is_elected_as_in_the_graph(rng):
    for _ in range(50):
        n = int(rng.integers(1, 7))
        scores = np.where(rng.random((n, 1)) < 0.2, np.nan, rng.integers(0, 3, (n, 1))).astype(np.float32)
        mask = np.ones((n, 1, 1), np.int64)
        found, best = aggregate(scores[..., None], mask, mask, "last")
        assert elect(found, np.full((n, 1), -1), "score")[0] == best


class SizedRequest:
    def __init__(self, key, prompt_slot, candidates, prompt, length, tokens):
        self.key, self.prompt_slot = key, prompt_slot
        self.shape, self.tokens = Shape(candidates, prompt, length), tokens


@st.composite
def pieces(draw):
    prompts = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    found = []
    for _ in range(draw(st.integers(1, 30))):
        column = draw(st.integers(0, len(prompts) - 1))
        candidates, length = draw(st.integers(1, 6)), draw(st.integers(1, 12))
        tokens = draw(st.integers(candidates, candidates * length))
        key = draw(st.sampled_from(["last", "mean", None]))
        found.append(SizedRequest(key, column, candidates, prompts[column], length, tokens))
    return found


def joint_run(members):
    """Slots and shape of a run of some requests."""
    columns = dict.fromkeys((work.prompt_slot for work in members), 0)
    for work in members:
        columns[work.prompt_slot] += work.shape.candidates
    shapes = [work.shape for work in members]
    shape = Shape(max(columns.values()), max(s.prompt for s in shapes), max(s.length for s in shapes))
    return len(columns), shape


@given(pieces(), st.integers(1, 400), st.integers(0, 50))
def test_a_plan_holds_every_request_once_within_its_bounds(requests, limit, call):
    fits = lambda columns, shape: padded_tokens(columns, shape) <= limit  # noqa: E731
    cost = lambda columns, shape: call + padded_tokens(columns, shape)  # noqa: E731
    groups = plan(requests, fits, cost)
    assert sorted(i for group in groups for i in group) == list(range(len(requests)))
    assert groups == sorted(map(sorted, groups)) == plan(requests, fits, cost)
    for group in groups:
        if len(group) == 1:
            continue
        members = [requests[i] for i in group]
        assert len({work.key for work in members}) == 1
        assert members[0].key is not None
        assert fits(*joint_run(members))
        # Together they take less than one by one.
        assert cost(*joint_run(members)) < sum(cost(1, work.shape) for work in members)


@given(pieces(), st.integers(1, 400), st.integers(0, 50))
def test_the_first_request_is_never_kept_waiting(requests, limit, call):
    fits = lambda columns, shape: padded_tokens(columns, shape) <= limit  # noqa: E731
    cost = lambda columns, shape: call + padded_tokens(columns, shape)  # noqa: E731
    found = company(requests, fits, cost)
    assert found[0] == 0
    assert found == sorted({*found})
    if len(found) > 1:
        assert fits(*joint_run([requests[i] for i in found]))


def test_requests_of_one_shape_fill_runs_to_the_limit():
    requests = [SizedRequest("last", i, 4, 10, 5, 20) for i in range(32)]
    fits = lambda columns, shape: padded_tokens(columns, shape) <= 240  # noqa: E731
    groups = plan(requests, fits, lambda columns, shape: 10 + padded_tokens(columns, shape))
    assert [len(group) for group in groups] == [8] * 4


def test_large_requests_run_alone_unless_they_share_their_prompt():
    cost = lambda columns, shape: CALL_TOKENS["cpu"] + padded_tokens(columns, shape)  # noqa: E731
    fits = lambda columns, shape: padded_tokens(columns, shape) <= 2048  # noqa: E731
    apart = [SizedRequest("last", i, 4, 100, 50, 200) for i in range(4)]
    assert plan(apart, fits, cost) == [[0], [1], [2], [3]]
    together = [SizedRequest("last", 0, 4, 100, 50, 200) for _ in range(4)]
    assert plan(together, fits, cost) == [[0, 1, 2, 3]]


def test_those_of_like_lengths_join():
    cost = lambda columns, shape: CALL_TOKENS["cpu"] + padded_tokens(columns, shape)  # noqa: E731
    lengths = [20, 5, 19, 6, 20, 5]
    requests = [SizedRequest("last", i, 4, 10, length, 4 * length) for i, length in enumerate(lengths)]
    fits = lambda columns, shape: padded_tokens(columns, shape) <= 2048  # noqa: E731
    assert plan(requests, fits, cost) == [[0, 2, 4], [1, 3, 5]]
    assert company(requests, fits, cost) == [0, 2, 4]
    assert company(requests[1:], fits, cost) == [0, 2, 4]

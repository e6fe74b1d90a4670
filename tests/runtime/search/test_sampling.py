"""Completions side by side: their votes, self-certainty, and how many are worth it."""

import math
from collections import Counter

import numpy as np
import pytest

from bonnx.runtime.artifact.manifest import Scoring
from bonnx.runtime.search.sampling import leader_is_safe
from tests.runtime.search.obvious import Reference, first, run, sequences
from tests.runtime.search.tabular import END, STEP, VOCABULARY, Table


def test_best_of_n_takes_the_candidate_of_the_highest_score(table):
    expected = [Reference(table).whole((), number) for number in range(12)]
    result = run(table, "best_of_n", 12)
    assert sequences(result) == expected
    assert result.best_index == np.argmax([table.score(prefix) for prefix in expected])
    assert result.answers is None


@pytest.mark.parametrize("method", ["weighted", "majority"])
def test_a_vote_takes_the_best_candidate_of_the_leading_answer(table, method):
    prefixes = [Reference(table).whole((), number) for number in range(12)]
    scores, answers = np.array([table.score(prefix) for prefix in prefixes]), [first(prefix) for prefix in prefixes]
    weights = scores if method == "weighted" else np.ones(12)
    result = run(table, method, 12, answers=first)
    sums = {a: sum(w for w, b in zip(weights, answers, strict=True) if a == b) for a in answers if a is not None}
    if not sums:
        # Nobody votes.
        assert result.best_index == scores.argmax()
        return
    most = max(sums.values())
    leading = [i for i, a in enumerate(answers) if a is not None and sums[a] > most - 1e-6]
    assert result.answers == tuple(answers)
    assert result.best_index in leading
    assert np.isclose(result.group_scores[result.best_index], most, rtol=1e-5)
    same = [i for i in leading if answers[i] == answers[result.best_index]]
    assert scores[result.best_index] == max(scores[i] for i in same)


@pytest.mark.parametrize("power", [0, 0.5, 1.2])
def test_self_certainty_is_the_papers_formula(table, power):
    expected = [Reference(table).whole((), number) for number in range(9)]
    sure = []
    for prefix in expected:
        shares = [np.exp(table.logits(prefix[:i]).astype(float)) for i in range(len(prefix))]
        shares = [share / share.sum() for share in shares]
        sure.append(-np.mean([np.log(VOCABULARY * share).mean() for share in shares]))
    rank = {i: place for place, i in enumerate(sorted(range(9), key=lambda i: -sure[i]), 1)}
    result = run(table, "self_certainty", 9, answers=first, power=power)
    points = {}
    for i, prefix in enumerate(expected):
        points[first(prefix)] = points.get(first(prefix), 0) + (9 - rank[i] + 1) ** power
    points.pop(None, None)
    assert result.vote == "borda"
    if points:
        assert np.isclose(points[first(expected[result.best_index])], max(points.values()))
    assert run(table, "self_certainty", 9).best_index == int(np.argmax(sure))


@pytest.mark.parametrize("price", [0.2, 0.05, 0.01])
def test_adaptive_stops_when_more_is_not_worth_its_price(table, price):
    expected = [Reference(table).whole((), number) for number in range(60)]
    scores = [table.score(prefix) for prefix in expected]
    enough = next((m for m in range(3, 60, 3) if (1 - max(scores[:m])) / (m + 1) <= price), 60)
    result = run(table, "adaptive", 60, batch=3, price=price)
    assert sequences(result) == expected[:enough]
    assert result.cost.sampled_tokens == sum(map(len, expected[:enough]))


def test_adaptive_votes_until_the_leader_is_safe(table):
    answers = [first(Reference(table).whole((), number)) for number in range(40)]
    result = run(table, "adaptive", 40, batch=2, vote="majority", answers=first, confidence=0.9)
    enough = next((m for m in range(2, 40, 2) if leader_is_safe(answers[:m], 0.9)), 40)
    assert len(result.candidates) == enough


def test_adaptive_may_stop_by_gain_and_vote(table):
    plain = run(table, "adaptive", 40, batch=2, price=0.05)
    voted = run(table, "adaptive", 40, batch=2, price=0.05, rule="gain", vote="weighted", answers=first)
    assert sequences(plain) == sequences(voted)
    assert voted.best_index == run(table, "weighted", len(plain.candidates), answers=first).best_index


def test_leader_is_safe_is_the_share_of_a_beta_distribution(rng):
    for _ in range(20):
        first_count, second = sorted(rng.integers(0, 12, 2))[::-1]
        answers = ["a"] * first_count + ["b"] * second + [None] * 3
        share = (rng.beta(first_count + 1, second + 1, 40_000) > 0.5).mean()
        for confidence in (0.5, 0.8, 0.95):
            if abs(share - confidence) > 0.02:
                assert leader_is_safe(answers, confidence) == (share > confidence)


def test_raw_scores_vote_by_their_softmax(table):
    table.manifest.scoring = Scoring(step_token=STEP, end_token=END, activation="none", vote_weight="softmax")
    plain, found = run(table, "best_of_n", 12), run(table, "weighted", 12, answers=first)
    scores = np.array([c.score for c in plain.candidates])
    voters = [i for i in range(12) if found.answers[i] is not None]
    shares = np.exp(scores[voters] - scores.max())
    totals = Counter()
    for i, share in zip(voters, shares / shares.sum(), strict=True):
        totals[found.answers[i]] += share
    for answer, group in zip(found.answers, found.group_scores, strict=True):
        assert answer is None or np.isclose(group, totals[answer], rtol=1e-5)
    if voters:
        assert np.isclose(found.group_scores[found.best_index], max(totals.values()), rtol=1e-5)


def test_the_known_best_is_found_with_enough_samples(rng):
    table = Table(int(rng.integers(2**31)), longest=2)
    ends = [(END,), *((a, b) for a in range(VOCABULARY) for b in range(VOCABULARY) if a != END)]
    best = max(ends, key=table.score)
    likely = math.exp(sum(table.log_prob(best[:i], token) for i, token in enumerate(best)))
    budget = math.ceil(12 / likely)
    if budget <= 4000:
        table.manifest.limits = type(table.manifest.limits)(max_tokens=4, max_candidates=budget)
        assert tuple(run(table, "best_of_n", budget).best.tokens.tolist()) == best

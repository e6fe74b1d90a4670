"""Each method of search against an obvious implementation of it, on a model that is a table."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from bonnx import InputError, NoWinnerError
from bonnx.runtime.artifact.manifest import Scoring
from bonnx.runtime.search import Choice, Policy, search
from bonnx.runtime.search.sampling import leader_is_safe
from tests.runtime.search.tabular import END, PROMPT, STEP, VOCABULARY, Table


def run(table, method, budget, *, answers=None, vote=None, scorer=None, deadline=None, policy=None, **options):
    return search(table.engine, PROMPT, method, budget, answers, vote, scorer, deadline, policy, options)


def first(tokens):
    """What a completion of the table votes for: its first token, none if that is 0."""
    return tokens[0] or None


class Reference:
    """Search without batches, caches or pending tokens: prefixes, and the table's draws by number."""

    def __init__(self, table):
        self.table, self.numbers, self.sampled = table, 0, 0

    def number(self):
        self.numbers += 1
        return self.numbers - 1

    def ended(self, prefix):
        return bool(prefix) and (prefix[-1] == END or len(prefix) == self.table.longest)

    def step(self, prefix, number, temperature=1.0):
        while True:
            prefix = (*prefix, self.table.draw(prefix, number, temperature))
            self.sampled += 1
            if self.ended(prefix):
                return prefix
            if prefix[-1] == STEP and self.table.draw(prefix, number, temperature) != END:
                return prefix

    def whole(self, prefix, number):
        while not self.ended(prefix):
            prefix = self.step(prefix, number)
        return prefix

    def beam(self, sizes, width, rounds=40, lookahead=0, distinct=True):
        active = [(group, (), self.number()) for group, size in enumerate(sizes) for _ in range(size)]
        left, done = list(sizes), []
        for round_ in range(rounds + 1):
            grow = self.whole if round_ == rounds else self.step
            active = [(group, grow(prefix, number), number) for group, prefix, number in active]
            values = []
            for _, prefix, _ in active:
                end = prefix
                if lookahead and not self.ended(prefix):
                    self.number()
                    for _ in range(lookahead):
                        if not self.ended(end):
                            end = self.step(end, 0, temperature=0)
                values.append(self.table.score(end))
            done += [prefix for _, prefix, _ in active if self.ended(prefix)]
            following = []
            kept = []
            for group in range(len(sizes)):
                mine = [i for i, row in enumerate(active) if row[0] == group]
                left[group] -= sum(self.ended(active[i][1]) for i in mine)
                going = sorted((i for i in mine if not self.ended(active[i][1])), key=lambda i: -values[i])
                if distinct:
                    firsts = {active[i][1]: i for i in sorted(going, reverse=True)}
                    going = [i for i in going if i in firsts.values()] + [i for i in going if i not in firsts.values()]
                kept.append(going[: math.ceil(left[group] / width)])
            for group in [g for g in dict.fromkeys(row[0] for row in active) if kept[g]]:
                for place, i in enumerate(kept[group]):
                    share = left[group] // len(kept[group]) + (place < left[group] % len(kept[group]))
                    _, prefix, number = active[i]
                    following += [(group, prefix, number)] + [(group, prefix, self.number()) for _ in range(share - 1)]
            if not following:
                return done
            active = following
        return done


def sequences(result):
    return [tuple(candidate.tokens.tolist()) for candidate in result.candidates]


@pytest.fixture
def table(rng):
    return Table(int(rng.integers(2**31)))


@pytest.mark.parametrize("repeat", range(6))
@pytest.mark.parametrize("method", ["beam", "lookahead", "dvts"])
def test_search_by_steps_is_the_obvious_one(rng, method, repeat):
    table = Table(int(rng.integers(2**31)), longest=int(rng.integers(4, 14)))
    budget, rounds, distinct = int(rng.integers(4, 40)), int(rng.integers(1, 6)), bool(rng.integers(2))
    width = ["sqrt", 1, 2, 3, 4][rng.integers(5)]
    if method == "lookahead":
        width, steps = ["sqrt", 1][rng.integers(2)], int(rng.integers(1, 4))
        result = run(table, method, budget, width=width, rounds=rounds, steps=steps, distinct=distinct)
        beams = budget // (steps + 1)
    else:
        steps, beams = 0, budget
        result = run(table, method, budget, width=width, rounds=rounds, distinct=distinct)
    wide = max(1, round(math.sqrt(beams))) if width == "sqrt" else width
    count = beams // wide if method == "dvts" else 1
    sizes = [beams // count + (i < beams % count) for i in range(count)]
    reference = Reference(table)
    expected = reference.beam(sizes, wide, rounds, steps, distinct)
    assert sequences(result) == expected
    assert len(expected) == beams
    scores = [table.score(prefix) for prefix in expected]
    assert result.best_index == int(np.argmax(scores))
    assert [c.score for c in result.candidates] == scores
    assert result.cost.sampled_tokens == reference.sampled
    assert result.cost.computed_tokens == result.cost.scored_tokens == table.computed
    for candidate, leaf in zip(result.candidates, result.leaves, strict=True):
        # The nodes from the leaf up are the candidate.
        tokens, node = [], leaf
        while node is not None:
            tokens, node = result.nodes[node].tokens + tokens, result.nodes[node].parent
        assert tokens == candidate.tokens.tolist()
        for i, score in enumerate(candidate.scores):
            assert score == np.float32(table.score(candidate.tokens[: i + 1]))


def test_sampling_and_its_votes(table):
    expected = [Reference(table).whole((), number) for number in range(12)]
    scores = np.array([table.score(prefix) for prefix in expected])
    answers = [first(prefix) for prefix in expected]
    result = run(table, "best_of_n", 12)
    assert sequences(result) == expected
    assert result.best_index == scores.argmax()
    assert result.answers is None
    weighted, majority = (run(table, method, 12, answers=first) for method in ("weighted", "majority"))
    for result, weight in ((weighted, scores), (majority, np.ones(12))):
        sums = {a: sum(w for w, b in zip(weight, answers, strict=True) if a == b) for a in answers if a is not None}
        if not sums:
            # Nobody votes.
            assert result.best_index == scores.argmax()
            continue
        most = max(sums.values())
        leading = [i for i, a in enumerate(answers) if a is not None and sums[a] > most - 1e-6]
        assert result.answers == tuple(answers)
        assert result.best_index in leading
        assert np.isclose(result.group_scores[result.best_index], most, rtol=1e-5)
        same = [i for i in leading if answers[i] == answers[result.best_index]]
        assert scores[result.best_index] == max(scores[i] for i in same)


def test_self_certainty_is_the_papers_formula(table):
    expected = [Reference(table).whole((), number) for number in range(9)]
    sure = []
    for prefix in expected:
        shares = [np.exp(table.logits(prefix[:i]).astype(float)) for i in range(len(prefix))]
        shares = [share / share.sum() for share in shares]
        sure.append(-np.mean([np.log(VOCABULARY * share).mean() for share in shares]))
    rank = {i: place for place, i in enumerate(sorted(range(9), key=lambda i: -sure[i]), 1)}
    for power in (0, 0.5, 1.2):
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


def test_a_scorer_of_ones_own_takes_the_place_of_the_models(table):
    seen = []

    def longest(ids):
        seen.append(list(ids))
        return len(ids)

    result = run(table, "best_of_n", 10, scorer=longest)
    assert [c.score for c in result.candidates] == [len(PROMPT) + len(s) for s in sequences(result)]
    assert seen[0] == [*PROMPT, *sequences(result)[0]]
    assert result.cost.scored_tokens == sum(map(len, seen))
    beam = run(table, "beam", 16, width=4, scorer=lambda ids: -len(ids))
    assert all(node.score == -(len(PROMPT) + _depth(beam.nodes, i)) for i, node in enumerate(beam.nodes))


@pytest.mark.parametrize("method", ["weighted", "adaptive", "pruned", "beam", "dvts"])
def test_a_scorers_numbers_are_weights_of_a_vote(table, method):
    options = {"answers": first, "vote": "weighted"}
    asked = []

    def below(ids):
        asked.append(ids)
        return -0.5

    with pytest.raises(InputError, match=r"scorer, for \[1, 2.*: in a weighted vote .* expected 0 or more, got -0.5"):
        run(table, method, 16, scorer=below, **options)
    assert len(asked) == 1
    with pytest.raises(InputError, match=r"expected 0 or more, got -0\.5"):
        run(table, "best_of_n", 8, policy=policy_of(method), scorer=below, **options)
    if method != "weighted":
        assert run(table, method, 16, scorer=below).best_index >= 0
        assert run(table, method, 16, scorer=below, answers=first, vote="majority").best_index >= 0
    found = run(table, method, 16, scorer=lambda ids: 2.0, **options)
    counts = Counter(answer for answer in found.answers if answer is not None)
    rated = [c.finish_reason != "pruned" for c in found.candidates]
    if all(rated) and counts:
        for answer, group in zip(found.answers, found.group_scores, strict=True):
            assert np.isnan(group) if answer is None else group == 2 * counts[answer]


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


@pytest.mark.parametrize("method", ["best_of_n", "adaptive", "pruned", "beam", "lookahead", "dvts"])
def test_a_scorer_is_asked_once_for_what_is_judged(table, method):
    asked = []

    def scorer(ids):
        asked.append(tuple(ids))
        return 0.01 * (sum(ids) % 89)

    result = run(table, method, 16, scorer=scorer, **({"every": 3} if method == "pruned" else {}))
    judged = len(result.nodes)
    if method == "pruned":
        # At each pruning those in the race, and in the end everyone.
        assert len(asked) <= judged * (1 + table.longest // 3)
    else:
        assert len(asked) == judged


def policy_of(method, options=None, probe=4, budget=8):
    return Policy(1, "table", "0" * 64, probe, [], {str(budget): [Choice(method, options or {})]})


METHODS_OF_TREES = {
    "best_of_n": {},
    "self_certainty": {},
    "adaptive": {"price": 1e-9},
    "pruned": {"every": 3},
    "beam": {"width": 2},
    "lookahead": {"width": 1, "steps": 1},
    "dvts": {"width": 2},
}


@pytest.mark.parametrize("method", METHODS_OF_TREES)
@pytest.mark.parametrize("probe", [0, 3, 8, 11])
def test_no_random_number_is_used_twice(table, method, probe):
    """Of each of a stream's numbers one token is drawn, whether a policy looked at the prompt first or not."""
    used, plain = Counter(), table.draw

    def draw(prefix, number, temperature=1.0):
        used[number, len(prefix)] += temperature > 0
        return plain(prefix, number, temperature)

    table.draw = draw
    options = METHODS_OF_TREES[method]
    if probe:
        found = run(table, "best_of_n", 8, policy=policy_of(method, options, probe))
        assert found.method == method
    else:
        found = run(table, method, 8, **options)
    assert max(used.values()) == 1
    assert found.cost.prompt_tokens == len(PROMPT)


def test_a_policys_samples_are_the_first_of_a_method_that_samples(table):
    expected = [Reference(table).whole((), number) for number in range(8)]
    for method in ("best_of_n", "self_certainty", "adaptive"):
        found = run(table, "best_of_n", 8, policy=policy_of(method, METHODS_OF_TREES[method]))
        assert sequences(found) == expected
        assert found.options["budget"] == 8
    # The first four are worth it, so there are no others.
    found = run(table, "best_of_n", 8, policy=policy_of("adaptive", {"price": 1e9}))
    assert sequences(found) == expected[:4]
    assert found.cost.sampled_tokens == sum(map(len, expected[:4]))
    # A majority counts each of them once.
    found = run(table, "best_of_n", 8, policy=policy_of("majority"), answers=first)
    assert sequences(found) == expected
    counts = Counter(first(sequence) for sequence in expected)
    if set(counts) == {None}:
        # Nobody votes, so each candidate stands for itself.
        assert np.array_equal(found.group_scores, [c.score for c in found.candidates])
        return
    for answer, group in zip(found.answers, found.group_scores, strict=True):
        assert np.isnan(group) if answer is None else group == counts[answer]


def test_beside_a_search_a_policys_samples_stand_for_themselves(table):
    reference = Reference(table)
    probed = [reference.whole((), reference.number()) for _ in range(4)]
    found = run(table, "best_of_n", 8, policy=policy_of("beam", {"width": 2}))
    assert sequences(found) == [*probed, *reference.beam([8], 2)]
    assert found.cost.sampled_tokens == reference.sampled
    reference = Reference(table)
    probed = [reference.whole((), reference.number()) for _ in range(4)]
    found = run(table, "best_of_n", 8, policy=policy_of("pruned", {"every": 3}))
    others = [reference.whole((), reference.number()) for _ in range(8)]
    assert sequences(found)[:4] == probed
    assert all(b[: len(a)] == a for a, b in zip(sequences(found)[4:], others, strict=True))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("bean", {}), "did you mean 'beam'"),
        (("beam", {"width": 0}), "width: expected"),
        (("best_of_n", {"temperature": 2}), "a policy does not say how to sample"),
        (("majority", {}), "needs answers"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_before_anything_is_computed(table, choice, message):
    policy = Policy(1, "table", "0" * 64, 4, [0.5], {"8": [Choice("best_of_n", {}), Choice(*choice)]})
    with pytest.raises(InputError, match=message):
        run(table, "best_of_n", 8, policy=policy)
    assert table.computed == 0


def test_a_prompt_that_cannot_be_rated_is_hard(table):
    policy = Policy(1, "table", "0" * 64, 2, [0.5], {"4": [Choice("best_of_n", {}), Choice("beam", {"width": 2})]})
    rated = iter([math.nan, math.nan])
    found = run(table, "best_of_n", 4, policy=policy, scorer=lambda ids: next(rated, 1.0))
    assert (found.method, found.policy["bin"]) == ("beam", 2)
    told = found.to_record(PROMPT, lambda tokens: [str(token) for token in tokens])
    assert json.loads(json.dumps(told, allow_nan=False))["policy"]["mean_score"] is None


def _depth(nodes, i):
    return len(nodes[i].tokens) + (0 if nodes[i].parent is None else _depth(nodes, nodes[i].parent))


def test_a_scorer_that_fails_says_so_and_nan_never_wins(table):
    def broken(ids):
        raise ZeroDivisionError("no such thing")

    with pytest.raises(InputError, match="it raised ZeroDivisionError: no such thing"):
        run(table, "beam", 8, scorer=broken)
    best = run(table, "best_of_n", 8).best_index
    wanted = sequences(run(table, "best_of_n", 8))[best]
    others = run(table, "best_of_n", 8, scorer=lambda ids: math.nan if tuple(ids[2:]) == wanted else 1.0)
    assert sequences(others)[others.best_index] != wanted
    with pytest.raises(NoWinnerError):
        run(table, "beam", 8, scorer=lambda ids: math.nan)


def test_the_known_best_is_found_with_enough_samples(rng):
    table = Table(int(rng.integers(2**31)), longest=2)
    ends = [(END,), *((a, b) for a in range(VOCABULARY) for b in range(VOCABULARY) if a != END)]
    best = max(ends, key=table.score)
    likely = math.exp(sum(table.log_prob(best[:i], token) for i, token in enumerate(best)))
    budget = math.ceil(12 / likely)
    if budget <= 4000:
        table.manifest.limits = type(table.manifest.limits)(max_tokens=4, max_candidates=budget)
        assert tuple(run(table, "best_of_n", budget).best.tokens.tolist()) == best


def test_without_a_step_token_a_search_is_best_of_n(table):
    never = Table(table.seed)
    never.logits = lambda prefix: table.logits(prefix) - 1e9 * (np.arange(VOCABULARY) == STEP)
    assert sequences(run(never, "beam", 8)) == sequences(run(never, "best_of_n", 8))


def test_a_deadline_cuts_and_still_chooses(table):
    slow = table._decode

    def decode(feeds, logits=False):
        import time

        time.sleep(0.02)
        return slow(feeds, logits)

    table._decode = decode
    result = run(table, "beam", 8, deadline=0.01)
    assert {candidate.finish_reason for candidate in result.candidates} <= {"deadline", "stop"}
    assert result.best_index >= 0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("bean", {}, "did you mean 'beam'"),
        ("beam", {"widht": 3}, "did you mean 'width'"),
        ("beam", {"width": 0}, "width: expected a whole number"),
        ("beam", {"width": 9}, "8 beams are fewer than the width, 9"),
        ("beam", {"rounds": 0}, "rounds: expected"),
        ("lookahead", {"steps": 8}, "8 is less than one beam that looks 8 steps ahead"),
        ("dvts", {"width": 9}, "fewer than the width"),
        ("majority", {}, "needs answers"),
        ("self_certainty", {"vote": "score"}, "votes by a rule of its own"),
        ("self_certainty", {"power": -1}, "power: expected"),
        ("self_certainty", {"power": math.inf}, "power: expected"),
        ("adaptive", {"price": 0}, "price: expected"),
        ("adaptive", {"price": "dear"}, "price: expected a number above 0; got 'dear'"),
        ("adaptive", {"ceiling": math.nan}, "ceiling: expected a finite number; got nan"),
        ("adaptive", {"ceiling": 10**400}, "ceiling: expected"),
        ("adaptive", {"confidence": 1.0}, "confidence: expected"),
        ("adaptive", {"rule": "leader"}, "needs a vote"),
        ("adaptive", {"rule": "x"}, "rule: expected"),
        ("pruned", {"keep": 0}, "keep: expected"),
        ("pruned", {"keep": None}, "keep: expected a number above 0"),
        ("revisions", {"chains": 9}, "8 attempts are fewer than 9 chains"),
        ("revisions", {"memory": 40}, "leave no room"),
        ("best_of_n", {"temperature": -1}, "temperature: expected"),
        ("best_of_n", {"answers": ["a", "b"]}, "there are no candidates yet"),
        ("best_of_n", {"deadline": 0}, "deadline: expected"),
        ("best_of_n", {"policy": "nowhere.json"}, "cannot be read"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(table, method, options, message):
    with pytest.raises(InputError, match=message):
        run(table, method, 8, **options)
    assert table.computed == 0


@pytest.mark.parametrize("budget", [0, -1, 2.5, True, 10**9])
def test_a_budget_is_a_whole_number_within_limits(table, budget):
    with pytest.raises(InputError, match=r"budget: expected|candidates: this artifact takes"):
        run(table, "best_of_n", budget)

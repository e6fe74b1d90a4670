"""Each method that searches by steps against an obvious implementation of it, on a model that is a table."""

import math
import time

import numpy as np
import pytest

from tests.runtime.search.obvious import Reference, run, sequences
from tests.runtime.search.tabular import STEP, VOCABULARY, Table


def tokens_up_to(nodes, leaf):
    """The tokens of the pieces from the prompt to a leaf."""
    if leaf is None:
        return []
    return tokens_up_to(nodes, nodes[leaf].parent) + nodes[leaf].tokens


def test_a_search_gives_the_winner_and_how_every_candidate_grew(table):
    result = run(table, "beam", 8, width=2)
    assert result.method == "beam"
    assert result.options == {"width": 2, "rounds": 40, "distinct": True, "budget": 8}
    assert [c.score for c in result.candidates] == [table.score(tokens) for tokens in sequences(result)]
    assert result.best.score == max(c.score for c in result.candidates)
    assert [tuple(tokens_up_to(result.nodes, leaf)) for leaf in result.leaves] == sequences(result)
    assert {node.fate for node in result.nodes} <= {"kept", "dropped", "finished", "cut"}
    assert result.cost.computed_tokens == table.computed


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
        assert tokens_up_to(result.nodes, leaf) == candidate.tokens.tolist()
        for i, score in enumerate(candidate.scores):
            assert score == np.float32(table.score(candidate.tokens[: i + 1]))


def test_without_a_step_token_a_search_is_best_of_n(table):
    never = Table(table.seed)
    never.logits = lambda prefix: table.logits(prefix) - 1e9 * (np.arange(VOCABULARY) == STEP)
    assert sequences(run(never, "beam", 8)) == sequences(run(never, "best_of_n", 8))


def test_a_deadline_cuts_and_still_chooses(table):
    slow = table._decode

    def decode(feeds, logits=False, stop=None):
        time.sleep(0.02)
        return slow(feeds, logits)

    table._decode = decode
    result = run(table, "beam", 8, deadline=0.01)
    assert {candidate.finish_reason for candidate in result.candidates} <= {"deadline", "stop"}
    assert result.best_index >= 0

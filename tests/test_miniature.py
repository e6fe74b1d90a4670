"""The miniature's figures against plain counting, and a run that was stopped."""

import gzip
import json

import numpy as np
import pytest

from benchmarks.miniature.__main__ import finished
from benchmarks.miniature.figures import figures, table
from benchmarks.miniature.pool import by_vote, majority, weighted
from benchmarks.miniature.results import Results, interval
from benchmarks.miniature.work import BUDGETS, METHODS, POOL, PROBE, plan, puzzles
from bonnx.models.countdown.puzzle import held_out
from bonnx.runtime.selection.aggregate import elect


@pytest.mark.parametrize(("vote", "choose"), [("weighted", weighted), ("majority", majority)])
@pytest.mark.parametrize("repeat", range(20))
def test_votes_are_those_of_the_graphs(rng, vote, choose, repeat):
    count = int(rng.integers(1, 30))
    scores = rng.uniform(size=count).astype(np.float32)
    answers = rng.integers(-1, 4, count)
    best, groups = elect(scores[:, None], answers[:, None], vote)
    chosen = choose(scores.astype(np.float64), answers)
    # Sums of float32 and of float64 may tie differently.
    assert np.isclose(groups[chosen, 0], groups[int(best[0]), 0], rtol=1e-5)
    if answers[chosen] == answers[int(best[0])]:
        assert chosen == int(best[0])
    assert by_vote(np.ones(count), scores, np.full(count, -1)) == scores.argmax()


def made(rng, count=10):
    """Results as a run stores them, at random."""
    results = {}
    for i in range(count):
        for model in ("shipped", "small", "small_outcome"):
            results[f"{model}/pool/{i}"] = {
                "right": rng.integers(0, 2, POOL).tolist(),
                "answers": rng.integers(-1, 9, POOL).tolist(),
                "score": rng.uniform(size=POOL).tolist(),
                "steps": [rng.uniform(size=3).tolist() for _ in range(POOL)],
                "certainty": rng.uniform(size=POOL).tolist(),
                "tokens": rng.integers(12, 20, POOL).tolist(),
                "probe_right": rng.integers(0, 2, PROBE).tolist(),
                "probe_score": rng.uniform(size=PROBE).tolist(),
                "probe_tokens": [19] * PROBE,
            }
        for kind in METHODS:
            results[f"shipped/{kind}/{i}"] = {str(b): [[*rng.integers(0, 2, 2).tolist(), 19 * b, 1]] for b in BUDGETS}
        results[f"shipped/greedy/{i}"] = {"right": int(rng.integers(2))}
    return results


def test_figures_count_what_is_stored(rng):
    results = made(rng)
    run = Results(results)
    assert run.count == 10
    drawn = {figure["id"]: figure for figure in figures(results)}
    assert {"methods", "search", "saving", "bins-16", "optimal", "aggregation", "labels", "flops"} <= set(drawn)
    right = np.array([results[f"shipped/pool/{i}"]["right"] for i in range(10)])
    score = np.array([results[f"shipped/pool/{i}"]["score"] for i in range(10)])
    series = {line["name"]: line["points"] for line in drawn["methods"]["series"]}
    for budget, point in zip(BUDGETS, series["best-of-N"], strict=True):
        groups = [(i, slice(s, s + budget)) for i in range(10) for s in range(0, POOL, budget)]
        solved = np.mean([right[i, part][score[i, part].argmax()] for i, part in groups])
        assert point["y"] == pytest.approx(100 * solved, abs=0.006)
        assert point["low"] <= point["y"] <= point["high"]
    beam = {line["name"]: line["points"] for line in drawn["search"]["series"]}["beam, M = 4"]
    assert beam[0]["y"] == pytest.approx(
        100 * np.mean([results[f"shipped/beam, M = 4/{i}"]["4"][0][1] for i in range(10)]), abs=0.006
    )
    assert "| beam, M = 4 |" in table(results, 10)
    json.dumps(figures(results), allow_nan=False)


def test_an_interval_covers_the_mean_of_its_population(rng):
    covered = 0
    for _ in range(100):
        bounds = interval((rng.uniform(size=200) < 0.3).astype(float), seed=int(rng.integers(2**31)))
        covered += bounds["low"] <= 30 <= bounds["high"]
    assert covered >= 85


def test_a_line_that_was_not_written_whole_is_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    whole = json.dumps({"task": "shipped/pool/0", "result": {"right": [1]}}) + "\n"
    path.write_text(whole + '{"task": "shipped/po')
    assert finished(path) == {"shipped/pool/0": {"right": [1]}}
    assert path.read_text() == whole
    assert finished(tmp_path / "none") == {}
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(whole.encode()))
    path.unlink()
    assert finished(path) == {"shipped/pool/0": {"right": [1]}}


def test_puzzles_are_held_out_and_the_first_ones_stay(rng):
    count = int(rng.integers(5, 30))
    drawn = puzzles(count)
    assert all(held_out(puzzle) and len(puzzle.numbers) == 4 for puzzle in drawn)
    assert puzzles(count + 7)[:count] == drawn
    assert len(set(plan(count))) == len(plan(count))

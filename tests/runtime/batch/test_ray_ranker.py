"""The class for `map_batches` of Ray Data."""

import numpy as np

from bonnx.runtime.batch.ray_ranker import Ranker
from tests.runtime.batch.rows import ROW, draw_row
from tests.tolerance import RUNTIME, within


def test_the_actor_class_ranks_batches(tiny, model, rng):
    rows = [draw_row(rng, i) for i in range(9)]
    prompts, candidates = np.empty(9, object), np.empty(9, object)
    for i, row in enumerate(rows):
        prompts[i] = np.array(row["prompt"])
        candidates[i] = np.empty(len(row["candidates"]), object)
        candidates[i][:] = [np.array(c) for c in row["candidates"]]
    columns = Ranker(str(tiny), aggregation="min")({"prompt": prompts, "candidates": candidates})
    for i, row in enumerate(rows):
        expected = model.rank(row["prompt"], row["candidates"], aggregation="min")
        assert within(columns["candidate_scores"][i], expected.candidate_scores, RUNTIME)


def test_a_row_does_not_end_a_dataset(tiny, model):
    prompts, candidates = np.empty(4, object), np.empty(4, object)
    prompts[:] = [np.array([1, 2])] * 4
    good = np.empty(2, object)
    good[:] = [np.array([3]), np.array([4, 5])]
    candidates[:] = [good, None, [np.array([500])], good]
    columns = Ranker(str(tiny))({"prompt": prompts, "candidates": candidates})
    expected = model.rank(**ROW)
    assert [reason is None for reason in columns["reason"]] == [True, False, False, True]
    assert "outside the vocabulary" in columns["reason"][2]
    assert columns["best_index"] == [expected.best_index, None, None, expected.best_index]
    assert columns["best"][0] == ROW["candidates"][expected.best_index]

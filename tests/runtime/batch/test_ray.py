"""The same batches on Ray Data, in processes of this machine."""

import json

import pytest

from benchmarks.kill import kill_a_worker, leftovers, run

pytest.importorskip("ray.data")


def test_a_run_whose_worker_is_killed_ends_with_the_bytes_of_one_that_is_not(tiny, rng, tmp_path):
    source = tmp_path / "rows.jsonl"
    with source.open("w") as file:
        for i in range(3000):
            candidates = [rng.integers(0, 130, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 5))]
            row = {"id": i, "prompt": rng.integers(0, 130, 5).tolist(), "candidates": candidates}
            file.write("{\n" if i % 700 == 3 else json.dumps(row) + "\n")
    common = [str(tiny), str(source), "--chunk", "16", "--threads", "1"]
    run([*common, "-o", str(tmp_path / "whole.jsonl")])
    output = tmp_path / "killed.jsonl"
    killed = kill_a_worker([*common, "-o", str(output), "--ray", "--ray-workers", "1"], output)
    assert killed == 1
    assert leftovers(output) == leftovers(tmp_path / "whole.jsonl")

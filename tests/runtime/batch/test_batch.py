"""Files of rows: each as `rank` gives it, whatever happens on the way."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import bonnx
from benchmarks.kill import kill_again_and_again, leftovers, run, start
from bonnx.command import main
from bonnx.runtime.batch import Task, here, run_batch
from bonnx.runtime.batch.output import Output
from bonnx.runtime.batch.ray_ranker import Ranker
from bonnx.runtime.batch.source import JsonLines
from bonnx.runtime.batch.tables import Parquet
from tests.tolerance import RUNTIME, within


@pytest.fixture(scope="module")
def model(tiny):
    return bonnx.load(tiny)


def draw_row(rng, number):
    candidates = [rng.integers(0, 130, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 5))]
    prompt = rng.integers(0, 130, rng.integers(1, 12)).tolist()
    return {
        "id": number,
        "prompt": prompt,
        "candidates": candidates,
        "note": "é\u2028\n",
        "big": 2**70,
        "x": {"y": [1.5]},
    }


def write(path, rows):
    with path.open("wb") as file:
        for row in rows:
            file.write(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n")
    return path


def check(found, row, model, **options):
    expected = model.rank(row["prompt"], row["candidates"], **options)
    added = {"best_index", "best", "candidate_scores", "margin"}
    assert {name: value for name, value in found.items() if name not in added} == row
    assert within(found["candidate_scores"], expected.candidate_scores, RUNTIME)
    assert found["best"] == row["candidates"][found["best_index"]]
    assert within(found["candidate_scores"][found["best_index"]], max(expected.candidate_scores), RUNTIME)
    assert (found["margin"] is None) == (expected.margin is None)


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


BAD = [
    (b"\n", None),
    (b"{\n", "not JSON"),
    (b"[1]\n", "expected a JSON object; got a list"),
    (b'{"prompt": [1], "candidates": NaN}\n', "NaN is not a JSON number"),
    (b"\xff\n", "not UTF-8"),
    (b"[" * 5000 + b"\n", "not JSON"),
    (b'{"prompt": [1]}\n', "it has no 'candidates', only 'prompt'; name the field with --candidates-field"),
    (b'{"prompt": [1], "candidates": "abc"}\n', "element for each candidate; got text"),
    (b'{"prompt": [1], "candidates": []}\n', "at least one"),
    (b'{"prompt": [1], "candidates": [[500]]}\n', "outside the vocabulary"),
    (b'{"prompt": [1], "candidates": [[]]}\n', "candidates[0]"),
    (b'{"prompt": {"a": 1}, "candidates": [[1]]}\n', "prompt"),
    (b'{"prompt": [1, [2]], "candidates": [[1]]}\n', ""),
    (b'{"prompt": [1e400], "candidates": [[1]]}\n', "the number 1e400 is out of range"),
    (b'{"prompt": [1], "candidates": [[1]], "best": 3}\n', "'best' already"),
    (b'{"prompt": ' + json.dumps([1] * 9000).encode() + b', "candidates": [[1]]}\n', "takes at most"),
    (b'{"prompt": [1], "candidates": [[1]], "note": "' + b"x" * 200_000 + b'"}\n', "more than 100000 bytes"),
]


def test_json_lines(tiny, model, rng, tmp_path, capsys):
    rows = [draw_row(rng, i) for i in range(150)]
    lines, places = list(rows), sorted(rng.integers(0, 150, len(BAD)).tolist(), reverse=True)
    for (line, _), place in zip(BAD, places, strict=True):
        lines.insert(place, line)
    source, output = write(tmp_path / "rows.jsonl", lines), tmp_path / "out.jsonl"
    arguments = [str(tiny), str(source), "-o", str(output), "--chunk", "16", "--max-line", "100000", "--json"]
    assert main(["batch", *arguments]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["rows"], said["bad"]) == (150, len(BAD) - 1)
    for found, row in zip(read(output), rows, strict=True):
        check(found, row, model)
    errors = read(tmp_path / "out.jsonl.errors.jsonl")
    numbers = {lines.index(line) + 1: reason for line, reason in BAD if reason is not None}
    assert {error["line"]: numbers[error["line"]] in error["reason"] for error in errors} == dict.fromkeys(
        numbers, True
    )
    assert [error["line"] for error in errors] == sorted(numbers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.errors.jsonl", "rows.jsonl"]


def test_parquet(tiny, model, rng, tmp_path):
    rows = [
        {"id": i, "prompt": r["prompt"], "candidates": r["candidates"]}
        for i, r in enumerate(draw_row(rng, 0) for _ in range(90))
    ]
    bad = {3: [[500]], 40: None, 41: []}
    table = pa.Table.from_pylist([row | ({"candidates": bad[i]} if i in bad else {}) for i, row in enumerate(rows)])
    source, output = tmp_path / "rows.parquet", tmp_path / "out.parquet"
    parquet.write_table(table, source, row_group_size=37)
    found = run_batch(Task(artifact=str(tiny), source=str(source), token_scores=True), output, here, rows=16)
    assert (found.rows, found.bad) == (87, 3)
    written = parquet.read_table(output)
    assert written.schema.names == [
        "id",
        "prompt",
        "candidates",
        "best_index",
        "best",
        "candidate_scores",
        "margin",
        "scores",
    ]
    good = [row for i, row in enumerate(rows) if i not in bad]
    for entry, row in zip(written.to_pylist(), good, strict=True):
        scores = entry.pop("scores")
        check(entry, row, model)
        assert list(map(len, scores)) == list(map(len, row["candidates"]))
    assert [error["line"] for error in read(tmp_path / "out.parquet.errors.jsonl")] == [4, 41, 42]


def test_votes_and_rules(tiny, model, rng, tmp_path):
    rows = [draw_row(rng, i) for i in range(20)]
    for row in rows:
        row["what"] = [int(a) if a else None for a in rng.integers(0, 3, len(row["candidates"]))]
    source, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    options = ["--answers-field", "what", "--vote", "weighted", "--aggregation", "mean"]
    assert main(["batch", str(tiny), str(source), "-o", str(output), *options]) == 0
    for found, row in zip(read(output), rows, strict=True):
        expected = model.rank(
            row["prompt"], row["candidates"], answers=row["what"], vote="weighted", aggregation="mean"
        )
        assert within(found["candidate_scores"], expected.candidate_scores, RUNTIME)
        assert within(expected.group_scores[found["best_index"]], expected.group_scores[expected.best_index], RUNTIME)


@pytest.mark.parametrize("count", [0, 1])
def test_few_rows(tiny, rng, tmp_path, count):
    rows = [draw_row(rng, i) for i in range(count)]
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows))  # no newline at the end
    assert run_batch(Task(artifact=str(tiny), source=str(source)), tmp_path / "o.jsonl", here).rows == count
    assert len(read(tmp_path / "o.jsonl")) == count
    columns = {"prompt": pa.list_(pa.int64()), "candidates": pa.list_(pa.list_(pa.int64()))}
    table = pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in columns.items()})
    parquet.write_table(table, tmp_path / "rows.parquet")
    task = Task(artifact=str(tiny), source=str(tmp_path / "rows.parquet"))
    assert run_batch(task, tmp_path / "o.parquet", here).rows == count
    assert parquet.read_table(tmp_path / "o.parquet").schema.names == [
        *columns,
        "best_index",
        "best",
        "candidate_scores",
        "margin",
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(tiny, rng, tmp_path, kind):
    rows = [
        {name: row[name] for name in ("id", "prompt", "candidates")} for row in (draw_row(rng, i) for i in range(1500))
    ]
    for i in range(0, 1500, 100):
        rows[i]["candidates"] = [[999]]
    source = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write(source, rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), source, row_group_size=400)
    (tmp_path / "peace").mkdir()
    (tmp_path / "war").mkdir()
    outputs = [tmp_path / place / f"out.{kind}" for place in ("peace", "war")]
    arguments = [[str(tiny), str(source), "-o", str(output), "--chunk", "8", "--threads", "1"] for output in outputs]
    seconds = run(arguments[0])
    for _ in range(2):
        kill_again_and_again(arguments[1], outputs[1], seconds, random.Random(int(rng.integers(2**32))))
        assert leftovers(outputs[1]) == leftovers(outputs[0])
        for path in outputs[1].parent.iterdir():
            path.unlink()


def interrupted(task, output, at, error, **options):
    """Stop a run after so many chunks."""

    def work(task, chunks):
        for number, result in enumerate(here(task, chunks)):
            if number == at:
                raise error
            yield result

    with pytest.raises(type(error)):
        run_batch(task, output, work, rows=8, **options)


def test_only_the_same_run_goes_on(tiny, rng, tmp_path):
    source, output = write(tmp_path / "rows.jsonl", [draw_row(rng, i) for i in range(60)]), tmp_path / "out.jsonl"
    task = Task(artifact=str(tiny), source=str(source))
    interrupted(task, output, 3, KeyboardInterrupt())
    assert not output.exists()
    for other, message in (
        (Task(artifact=str(tiny), source=str(source), options={"aggregation": "mean"}), "options was {}, is"),
        (Task(artifact=str(tiny), source=str(source), threads=1), "threads was None, is 1"),
    ):
        with pytest.raises(bonnx.InputError, match=message):
            run_batch(other, output, here, rows=8)
    with pytest.raises(bonnx.InputError, match="chunk was 8, is 9"):
        run_batch(task, output, here, rows=9)
    with source.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(bonnx.InputError, match="input_size was"):
        run_batch(task, output, here, rows=8)
    found = run_batch(task, output, here, rows=8, overwrite=True)
    assert (found.rows, found.resumed_at) == (60, 0)
    with pytest.raises(bonnx.InputError, match="exists; choose another file"):
        run_batch(task, output, here, rows=8)


@pytest.mark.parametrize("where", ["_place", "replace", "unlink"])
def test_the_last_moves_may_be_interrupted_too(tiny, rng, tmp_path, monkeypatch, where):
    rows = [draw_row(rng, i) for i in range(30)]
    source, output = write(tmp_path / "rows.jsonl", [b"{\n", *rows]), tmp_path / "out.jsonl"
    task = Task(artifact=str(tiny), source=str(source))
    run_batch(task, tmp_path / "peace.jsonl", here, rows=8)
    with monkeypatch.context() as patch:
        if where == "_place":
            patch.setattr(Output, "_place", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            real = getattr(type(output), where)

            def act(self, *arguments, **options):
                if self.name.endswith((".errors.part", ".progress")) and not self.name.endswith(".new"):
                    raise KeyboardInterrupt
                return real(self, *arguments, **options)

            patch.setattr(type(output), where, act)
        with pytest.raises(KeyboardInterrupt):
            run_batch(task, output, here, rows=8)
    assert run_batch(task, output, here, rows=8).rows == 30
    assert leftovers(output) == leftovers(tmp_path / "peace.jsonl")


def test_strict_stops_and_goes_on_without_it(tiny, rng, tmp_path, capsys):
    lines = [draw_row(rng, i) for i in range(40)]
    lines[20] = b"{\n"
    source, output = write(tmp_path / "rows.jsonl", lines), tmp_path / "out.jsonl"
    arguments = ["batch", str(tiny), str(source), "-o", str(output), "--chunk", "8"]
    assert main([*arguments, "--strict"]) == 2
    assert '"line": 21' in capsys.readouterr().err
    assert main(arguments) == 0
    assert len(read(output)) == 39


def test_a_full_disk_is_said_and_gone_on_from(tiny, rng, tmp_path, monkeypatch):
    source, output = write(tmp_path / "rows.jsonl", [draw_row(rng, i) for i in range(60)]), tmp_path / "out.jsonl"
    task = Task(artifact=str(tiny), source=str(source))
    run_batch(task, tmp_path / "peace.jsonl", here, rows=8)
    with monkeypatch.context() as patch:
        real, count = os.fsync, iter(range(100))

        def full(descriptor):
            if next(count) == 9:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        patch.setattr(os, "fsync", full)
        patch.setattr("bonnx.runtime.batch.output._SECONDS", 0.0)
        with pytest.raises(bonnx.BonnxError, match="No space left on device; make room and start again"):
            run_batch(task, output, here, rows=8)
    assert run_batch(task, output, here, rows=8).rows == 60
    assert leftovers(output) == leftovers(tmp_path / "peace.jsonl")


def test_two_runs_do_not_write_one_file(tiny, rng, tmp_path):
    source, output = write(tmp_path / "rows.jsonl", [draw_row(rng, 0)]), tmp_path / "out.jsonl"
    with Output(output, {}, overwrite=False), pytest.raises(bonnx.InputError, match="another run is writing it"):
        run_batch(Task(artifact=str(tiny), source=str(source)), output, here)


def test_sigterm_leaves_what_is_done(tiny, rng, tmp_path):
    source, output = write(tmp_path / "rows.jsonl", [draw_row(rng, i) for i in range(4000)]), tmp_path / "out.jsonl"
    arguments = [str(tiny), str(source), "-o", str(output), "--chunk", "4", "--threads", "1"]
    process, until = start(arguments), time.monotonic() + 60
    while not output.with_name("out.jsonl.progress").is_file():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    run(arguments)
    assert [row["id"] for row in read(output)] == list(range(4000))


def test_wrong_files_are_said(tiny, rng, tmp_path):
    source = write(tmp_path / "rows.jsonl", [draw_row(rng, 0)])
    table = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"prompt": ["x"], "best": ["y"], "candidates": [["z"]]}), table)
    (tmp_path / "text.parquet").write_text("text")
    for name, output, message in (
        ("none.jsonl", "o.jsonl", "no such file"),
        ("rows.jsonl", "o.parquet", "expected a name that ends with .jsonl"),
        ("rows.jsonl", "rows.jsonl", "rows.jsonl is the input"),
        ("rows.jsonl", "no/o.jsonl", "no such folder"),
        ("rows.parquet", "o.parquet", "a column 'best' already"),
        ("text.parquet", "o.parquet", "cannot be read as Parquet"),
    ):
        with pytest.raises(bonnx.InputError, match=message):
            run_batch(Task(artifact=str(tiny), source=str(tmp_path / name)), tmp_path / output, here)
    with pytest.raises(bonnx.InputError, match="no column 'question', only prompt"):
        Task(artifact=str(tiny), source=str(table), prompt="question").open()
    assert source.read_bytes()


def test_chunks_hold_every_line_once(rng, tmp_path):
    lines = [b"x" * int(rng.integers(0, 50)) + b"\n" for _ in range(500)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(lines)[:-1])
    chunks = [*JsonLines(path, 100).chunks(int(rng.integers(1, 60)))]
    data = path.read_bytes()
    assert b"".join(data[chunk.start : chunk.stop] for chunk in chunks) == data
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    for chunk in chunks:
        assert chunk.first == data[: chunk.start].count(b"\n") + 1
    parquet.write_table(pa.table({"a": range(100)}), tmp_path / "a.parquet", row_group_size=30)
    table = Parquet(tmp_path / "a.parquet", ["a"], "a", [])
    found = [row for chunk in table.chunks(7) for row in table.read(chunk).rows]
    assert [(row.line, row.values["a"]) for row in found] == [(i + 1, i) for i in range(100)]


def test_the_actor_class_ranks_batches(tiny, model, rng):
    rows = [draw_row(rng, i) for i in range(9)]
    prompts, candidates = np.empty(9, object), np.empty(9, object)
    for i, row in enumerate(rows):
        prompts[i] = np.array(row["prompt"])
        candidates[i] = np.empty(len(row["candidates"]), object)
        candidates[i][:] = [np.array(c) for c in row["candidates"]]
    found = Ranker(str(tiny), aggregation="min")({"prompt": prompts, "candidates": candidates})
    for i, row in enumerate(rows):
        expected = model.rank(row["prompt"], row["candidates"], aggregation="min")
        assert within(found["candidate_scores"][i], expected.candidate_scores, RUNTIME)


def test_the_command_says_what_came_of_it(tiny, rng, tmp_path):
    source = write(tmp_path / "rows.jsonl", [draw_row(rng, 0), b"{\n"])
    command = ["batch", str(tiny), str(source), "-o", str(tmp_path / "o.jsonl")]
    done = subprocess.run([sys.executable, "-m", "bonnx", *command], capture_output=True, text=True, check=True)
    assert "1 rows, 1 bad ones in" in done.stdout

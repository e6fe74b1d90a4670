"""A run that is interrupted, wherever it is, goes on to the same bytes; another run is refused."""

import errno
import itertools
import os
import random
import signal
import sys
import time

import pyarrow as pa
import pytest
from pyarrow import parquet

import bonnx
from benchmarks.kill import kill_again_and_again, leftovers, run, start
from bonnx.runtime.batch import Task, here, run_batch
from bonnx.runtime.batch.output import Output
from tests.runtime.batch.rows import LISTS, ROW, draw_row, dump, interrupted, read, write


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
    outputs = [tmp_path / place / f"out.{kind}" for place in ("whole", "killed")]
    for output in outputs:
        output.parent.mkdir()
    arguments = [[str(tiny), str(source), "-o", str(output), "--chunk", "8", "--threads", "1"] for output in outputs]
    seconds = run(arguments[0])
    kill_again_and_again(arguments[1], outputs[1], seconds, random.Random(int(rng.integers(2**32))))
    assert leftovers(outputs[1]) == leftovers(outputs[0])


def test_only_the_same_run_goes_on(tiny, rng, tmp_path):
    source, output = write(tmp_path / "rows.jsonl", [draw_row(rng, i) for i in range(60)]), tmp_path / "out.jsonl"
    task = Task(artifact=str(tiny), source=str(source))
    interrupted(task, output, 3, KeyboardInterrupt())
    assert not output.exists()
    other = Task(artifact=str(tiny), source=str(source), options={"aggregation": "mean"})
    with pytest.raises(bonnx.InputError, match=r"options was \{\}, is"):
        run_batch(other, output, here, rows=8)
    with pytest.raises(bonnx.InputError, match="threads was None, is 1"):
        run_batch(Task(artifact=str(tiny), source=str(source), threads=1), output, here, rows=8)
    with pytest.raises(bonnx.InputError, match="chunk was 8, is 9"):
        run_batch(task, output, here, rows=9)
    with source.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(bonnx.InputError, match="input_size was"):
        run_batch(task, output, here, rows=8)
    summary = run_batch(task, output, here, rows=8, overwrite=True)
    assert (summary.rows, summary.resumed_at) == (60, 0)
    with pytest.raises(bonnx.InputError, match="exists; choose another file"):
        run_batch(task, output, here, rows=8)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_last_moves_may_be_interrupted_anywhere(tiny, rng, tmp_path, monkeypatch, kind):
    rows = [
        {name: row[name] for name in ("id", "prompt", "candidates")} for row in (draw_row(rng, i) for i in range(30))
    ]
    rows[7]["candidates"] = [[999]]
    source = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write(source, rows)
    else:
        parquet.write_table(pa.Table.from_pylist(rows), source)
    task = Task(artifact=str(tiny), source=str(source))
    run_batch(task, tmp_path / f"whole.{kind}", here, rows=8)
    place, moves, placing = Output._place, itertools.count(), False

    def watched(self):
        nonlocal placing
        placing = True
        try:
            place(self)
        finally:
            placing = False

    def interrupt(event, _):
        if placing and event in ("os.rename", "os.remove", "os.rmdir") and next(moves) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Output, "_place", watched)
    sys.addaudithook(interrupt)
    for at in itertools.count():
        moves, output = itertools.count(), tmp_path / f"out{at}.{kind}"
        try:
            run_batch(task, output, here, rows=8)
            break
        except KeyboardInterrupt:
            if output.with_name(f"{output.name}.progress").exists():
                run_batch(task, output, here, rows=8)
            else:
                # All is in place; only the lock's file is left over.
                output.with_name(f"{output.name}.lock").unlink()
        assert leftovers(output) == leftovers(tmp_path / f"whole.{kind}"), at
        assert {path.name for path in tmp_path.glob(f"{output.stem}.*")} == {output.name, f"{output.name}.errors.jsonl"}
    assert at >= (4 if kind == "jsonl" else 9)


def test_a_run_goes_on_after_the_disk_was_full(tiny, rng, tmp_path, monkeypatch):
    source, output = write(tmp_path / "rows.jsonl", [draw_row(rng, i) for i in range(60)]), tmp_path / "out.jsonl"
    task = Task(artifact=str(tiny), source=str(source))
    run_batch(task, tmp_path / "whole.jsonl", here, rows=8)
    with monkeypatch.context() as patch:
        real, count = os.fsync, iter(range(100))

        def full(descriptor):
            if next(count) == 9:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        patch.setattr(os, "fsync", full)
        patch.setattr("bonnx.runtime.batch.output._SECONDS", 0.0)
        with pytest.raises(bonnx.BonnxError, match="No space left on device; free some space and start again"):
            run_batch(task, output, here, rows=8)
    assert run_batch(task, output, here, rows=8).rows == 60
    assert leftovers(output) == leftovers(tmp_path / "whole.jsonl")


def test_sigterm_leaves_what_is_done(tiny, rng, tmp_path):
    source, output = write(tmp_path / "rows.jsonl", [draw_row(rng, i) for i in range(4000)]), tmp_path / "out.jsonl"
    arguments = [str(tiny), str(source), "-o", str(output), "--chunk", "4", "--threads", "1"]
    process, until = start(arguments), time.monotonic() + 300
    while not output.with_name("out.jsonl.progress").is_file():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    run(arguments)
    assert [row["id"] for row in read(output)] == list(range(4000))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_one_byte_anywhere_is_another_input(tiny, tmp_path, rng, kind):
    source, output = tmp_path / f"rows.{kind}", tmp_path / f"out.{kind}"
    count = 2000
    if kind == "jsonl":
        source.write_bytes(b"".join(dump(ROW | {"id": i, "note": "x" * 300}) + b"\n" for i in range(count)))
    else:
        notes = [rng.bytes(300) for _ in range(count)]
        candidates = pa.array([ROW["candidates"]] * count, LISTS)
        parquet.write_table(pa.table({"note": notes, "prompt": [[1]] * count, "candidates": candidates}), source)
    whole = source.read_bytes()
    assert len(whole) > 300_000
    task = Task(artifact=str(tiny), source=str(source))
    interrupted(task, output, 2, KeyboardInterrupt())
    times = source.stat()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1
    source.write_bytes(middle)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(bonnx.InputError, match="input_sha256 was"):
        run_batch(task, output, here, rows=8)
    source.write_bytes(whole)
    assert run_batch(task, output, here, rows=1000, overwrite=True).rows == count


def test_an_input_that_changes_while_it_is_ranked(tiny, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(dump(ROW) + b"\n")

    def work(task, chunks):
        yield from here(task, chunks)
        with source.open("ab") as file:
            file.write(dump(ROW))

    with pytest.raises(bonnx.InputError, match="changed while it was ranked"):
        run_batch(Task(artifact=str(tiny), source=str(source)), tmp_path / "o.jsonl", work)
    assert not (tmp_path / "o.jsonl").exists()


def test_a_missing_part_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("bonnx.runtime.batch.output._SECONDS", 0.0)
    source, output = tmp_path / "rows.parquet", tmp_path / "o.parquet"
    parquet.write_table(pa.table({"prompt": [[1]] * 40, "candidates": pa.array([[[2]]] * 40, LISTS)}), source)
    task = Task(artifact=str(tiny), source=str(source))
    interrupted(task, output, 2, KeyboardInterrupt())
    part = tmp_path / "o.parquet.part"
    (part / ".hidden").write_bytes(b"")
    assert run_batch(task, output, here, rows=8).rows == 40
    interrupted(task, output, 2, KeyboardInterrupt(), overwrite=True)
    min(part.iterdir()).unlink()
    with pytest.raises(bonnx.InputError, match="part 0 is gone"):
        run_batch(task, output, here, rows=8)

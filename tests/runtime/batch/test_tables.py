"""Parquet files: columns of every type, and how either kind of file is cut into chunks."""

import sys

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import bonnx
from bonnx.command import main
from bonnx.runtime.batch import Task, here, run_batch
from bonnx.runtime.batch.source import JsonLines
from bonnx.runtime.batch.tables import Parquet
from tests.runtime.batch.rows import LISTS, ROW
from tests.tolerance import RUNTIME, within

KINDS = [
    LISTS,
    pa.large_list(pa.large_list(pa.int32())),
    pa.list_view(pa.list_view(pa.uint8())),
    pa.large_list_view(pa.list_(pa.int16())),
    pa.list_(pa.list_(pa.uint64()), 2),
    pa.list_(pa.struct([("text", pa.list_(pa.int64())), ("more", pa.string())])),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_lists_of_every_kind(batch, model, kind):
    struct = pa.types.is_struct(kind.value_type)
    candidates = [{"text": c, "more": "x"} if struct else c for c in ROW["candidates"]]
    # A type that `Table.take` of pyarrow cannot take.
    notes = pa.array(["a", "b", "c"], pa.string_view())
    own = pa.array([candidates, None, candidates], kind)
    ranked, errors = batch(pa.table({"note": notes, "prompt": [ROW["prompt"]] * 3, "candidates": own}))
    assert errors == {2: "its 'candidates' is null"}
    expected = model.rank(**ROW)
    assert ranked["note"].to_pylist() == ["a", "c"]
    assert ranked.schema.field("candidates").type == kind
    assert ranked.schema.field("best").type == kind.value_type
    assert ranked["best"].to_pylist() == [candidates[expected.best_index]] * 2
    assert within(np.array(ranked["candidate_scores"].to_pylist()), [expected.candidate_scores] * 2, RUNTIME)


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.nulls(2), "its 'candidates' is null"),
        (pa.array(["[[1]]"] * 2), "got text that holds JSON"),
        (pa.array(["[[1]]"] * 2, pa.string_view()), "got text that holds JSON"),
        (pa.array(["a"] * 2).dictionary_encode(), "got text"),
        (pa.array([{"text": "a"}] * 2), "got an object"),
        (pa.array([1, 2]), "got a whole number"),
        (pa.array([[("a", 1)]] * 2, pa.map_(pa.string(), pa.int64())), "got tuple"),
        (pa.array([[b"a"]] * 2), "got bytes"),
        (pa.array([[None]] * 2), "got null"),
        (pa.array([[[1, None]]] * 2), "got a list of a whole number and of null"),
        (pa.array([[[1.0]]] * 2, pa.list_(pa.list_(pa.float16()))), "a number that is not whole"),
        (pa.array([10**7] * 2, pa.date32()), "OverflowError"),
        (pa.ListArray.from_arrays([0, 1, 2], pa.array([b"\xff"] * 2).view(pa.string())), "UnicodeDecodeError"),
    ],
    ids=str,
)
def test_columns_that_hold_no_candidates(batch, column, reason):
    ranked, errors = batch(pa.table({"prompt": [[1]] * 2, "candidates": column}))
    assert len(ranked) == 0
    assert ranked.schema.names == ["prompt", "candidates", "best_index", "best", "candidate_scores", "margin"]
    assert sorted(errors) == [1, 2]
    assert all(reason in said for said in errors.values())


def test_names_of_columns(batch):
    prompts, candidates, ids = pa.array([[1]]), pa.array([[[2]]], LISTS), pa.array([7])
    twice = pa.Table.from_arrays([ids, ids, prompts, candidates], names=["id", "id", "prompt", "candidates"])
    ranked, errors = batch(twice)
    assert (ranked.column(0).to_pylist(), ranked.column(1).to_pylist(), errors) == ([7], [7], {})
    with pytest.raises(bonnx.InputError, match="it has 2 columns 'prompt'; expected one"):
        batch(pa.Table.from_arrays([prompts, prompts, candidates], names=["prompt", "prompt", "candidates"]))
    with pytest.raises(bonnx.InputError, match=r"no column 'prompt', only question, candidates; .*--prompt-field"):
        batch(pa.Table.from_arrays([prompts, candidates], names=["question", "candidates"]))


def test_folders_named_as_partitions_add_no_columns(tiny, tmp_path):
    folder = tmp_path / "year=2024"
    folder.mkdir()
    parquet.write_table(pa.table({"prompt": [[1]], "candidates": pa.array([[[2]]], LISTS)}), folder / "rows.parquet")
    run_batch(Task(artifact=str(tiny), source=str(folder / "rows.parquet")), folder / "out.parquet", here)
    assert "year" not in parquet.ParquetFile(folder / "out.parquet").schema_arrow.names


def test_without_pyarrow(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["batch", str(tiny), str(tmp_path / "rows.parquet"), "-o", str(tmp_path / "o.parquet")]) == 2
    assert "run `pip install bonnx[parquet]`" in capsys.readouterr().err


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

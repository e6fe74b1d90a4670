"""`bonnx batch` on whole files: each row as `rank` gives it, and what is refused before the first row."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

import bonnx
from bonnx.command import main
from bonnx.runtime.batch import Task, here, run_batch
from tests.runtime.batch.rows import ROW, draw_row, dump, read, write
from tests.tolerance import RUNTIME, within


def check(found, row, model, **options):
    expected = model.rank(row["prompt"], row["candidates"], **options)
    added = {"best_index", "best", "candidate_scores", "margin"}
    assert {name: value for name, value in found.items() if name not in added} == row
    assert within(found["candidate_scores"], expected.candidate_scores, RUNTIME)
    assert found["best"] == row["candidates"][found["best_index"]]
    assert within(found["candidate_scores"][found["best_index"]], max(expected.candidate_scores), RUNTIME)
    assert (found["margin"] is None) == (expected.margin is None)


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
    answer = json.loads(capsys.readouterr().out)
    assert (answer["rows"], answer["bad"]) == (150, len(BAD) - 1)
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
    summary = run_batch(Task(artifact=str(tiny), source=str(source), token_scores=True), output, here, rows=16)
    assert (summary.rows, summary.bad) == (87, 3)
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


def test_strict_stops_and_goes_on_without_it(tiny, rng, tmp_path, capsys):
    lines = [draw_row(rng, i) for i in range(40)]
    lines[20] = b"{\n"
    source, output = write(tmp_path / "rows.jsonl", lines), tmp_path / "out.jsonl"
    arguments = ["batch", str(tiny), str(source), "-o", str(output), "--chunk", "8"]
    assert main([*arguments, "--strict"]) == 2
    assert '"line": 21' in capsys.readouterr().err
    assert main(arguments) == 0
    assert len(read(output)) == 39


def test_the_command_says_what_came_of_it(tiny, rng, tmp_path):
    source = write(tmp_path / "rows.jsonl", [draw_row(rng, 0), b"{\n"])
    command = ["batch", str(tiny), str(source), "-o", str(tmp_path / "o.jsonl")]
    done = subprocess.run([sys.executable, "-m", "bonnx", *command], capture_output=True, text=True, check=True)
    assert "1 row, 1 bad in" in done.stdout


def test_no_rows_are_no_success(tiny, tmp_path, capsys):
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    command = ["batch", str(tiny), str(source), "-o", str(output), "--overwrite", "--json"]
    source.write_bytes(b'{"question": [1], "candidates": [[2]]}\n' * 3)
    assert main(command) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    for part in (
        "no row was ranked, 3 are in",
        "out.jsonl.errors.jsonl",
        "only 'question', 'candidates'",
        "--prompt-field",
    ):
        assert part in answer["reason"]
    source.write_bytes(b"")
    assert main(command) == 1
    assert "the input has none" in capsys.readouterr().err
    assert main([*command, "--prompt-field", "question"]) == 1
    source.write_bytes(b'{"question": [1], "candidates": [[2]]}\n{}\n')
    capsys.readouterr()
    assert main([*command, "--prompt-field", "question"]) == 0
    assert json.loads(capsys.readouterr().out)["bad"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--aggregation", "first"], "aggregation: expected one of last"),
        (["--vote", "weighted"], "--vote weighted: needs --answers or --answers-field"),
        (["--answers", "regex:("], "is not a regular expression"),
    ],
)
def test_options_that_no_row_could_mend(tiny, tmp_path, capsys, options, message):
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(dump(ROW) + b"\n")
    assert main(["batch", str(tiny), str(source), "-o", str(output), *options]) == 2
    assert message in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == [source]


@pytest.fixture
def folder(tmp_path):
    """Files of all kinds, good and bad."""
    source = tmp_path / "rows.jsonl"
    source.write_bytes(dump(ROW))
    (tmp_path / "o.jsonl.errors.jsonl").write_bytes(dump(ROW))
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.link(source, tmp_path / "link.jsonl")
    table = pa.table({"prompt": ["x"], "best": ["y"], "candidates": [["z"]]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "text.parquet").write_text("text")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("none.jsonl", "o.jsonl", "no such file"),
        ("rows.jsonl", "o.parquet", "expected a name that ends with .jsonl"),
        ("rows.jsonl", "rows.jsonl", "rows.jsonl is the input"),
        ("rows.jsonl", "no/o.jsonl", "no such folder"),
        ("rows.parquet", "o.parquet", "a column 'best' already"),
        ("text.parquet", "o.parquet", "cannot be read as Parquet"),
        ("folder.jsonl", "o.jsonl", "it is a folder"),
        ("pipe.jsonl", "o.jsonl", "no regular file"),
        ("rows.jsonl", "link.jsonl", "link.jsonl is the input"),
        ("o.jsonl.errors.jsonl", "o.jsonl", "errors.jsonl is the input"),
        ("rows.jsonl", "folder.jsonl", "expected the name of a file"),
        ("rows.jsonl", "rows.jsonl/o.jsonl", "no such folder"),
        ("rows.jsonl", "x" * 300 + ".jsonl", "cannot be written: File name too long; choose a folder that can be"),
    ],
)
def test_files_that_are_refused(tiny, folder, source, output, message):
    with pytest.raises(bonnx.InputError, match=message):
        run_batch(Task(artifact=str(tiny), source=str(folder / source)), folder / output, here)
    assert (folder / "rows.jsonl").read_bytes() == (folder / "o.jsonl.errors.jsonl").read_bytes() == dump(ROW)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tiny, folder):
    (folder / "closed").mkdir(mode=0o500)
    with pytest.raises(bonnx.InputError, match="cannot be written: Permission denied"):
        run_batch(Task(artifact=str(tiny), source=str(folder / "rows.jsonl")), folder / "closed/o.jsonl", here)


def test_a_column_that_is_missing_is_named(tiny, folder):
    with pytest.raises(bonnx.InputError, match="no column 'question', only prompt"):
        Task(artifact=str(tiny), source=str(folder / "rows.parquet"), prompt="question").open()

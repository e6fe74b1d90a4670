"""Whatever a row is, it is either answered or in the file of errors, and what is around a run is checked before it."""

import fcntl
import json
import os
import sys
import threading
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import bonnx
from bonnx.command import main
from bonnx.runtime.batch import Task, here, run_batch
from bonnx.runtime.batch import worker as batch_worker
from bonnx.runtime.batch.output import Output, _take
from bonnx.runtime.batch.ray_ranker import Ranker
from bonnx.runtime.batch.worker import Worker
from bonnx.runtime.engine.engine import open_engine
from tests.tolerance import RUNTIME, within

ROW = {"prompt": [1, 2], "candidates": [[3], [4, 5]]}


@pytest.fixture(scope="module")
def engine(tiny):
    return open_engine(tiny)


@pytest.fixture(scope="module")
def model(engine):
    return bonnx.Model(engine)


@pytest.fixture
def batch(tiny, engine, tmp_path):
    """Rank lines of JSON, or a table; what came out, and the reasons of the rows that are bad."""

    def batch(rows, **options):
        table = isinstance(rows, pa.Table)
        kind = "parquet" if table else "jsonl"
        source, output = tmp_path / f"rows.{kind}", tmp_path / f"out.{kind}"
        if table:
            parquet.write_table(rows, source, row_group_size=2)
        else:
            source.write_bytes(rows if isinstance(rows, bytes) else b"\n".join(rows))
        worker = Worker(Task(artifact=str(tiny), source=str(source), **options), engine)
        found = run_batch(worker.task, output, lambda _, chunks: map(worker, chunks), rows=3, overwrite=True)
        said = output.with_name(f"{output.name}.errors.jsonl")
        errors = [json.loads(line) for line in said.read_bytes().splitlines()] if said.exists() else []
        ranked = parquet.ParquetFile(output).read() if table else output.read_bytes().split(b"\n")[:-1]
        assert (len(ranked), len(errors)) == (found.rows, found.bad)
        assert all(error["reason"] for error in errors)
        return ranked, {error["line"]: error["reason"] for error in errors}

    return batch


def dump(value):
    return json.dumps(value).encode()


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.text(st.characters(categories=["Cs"]))
)
VALUES = st.recursive(
    SCALARS,
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(max_size=3), parts, max_size=3),
    max_leaves=6,
)
TOKENS = st.lists(st.integers(0, 129), max_size=4)
MESSAGES = st.lists(st.fixed_dictionaries({"role": VALUES, "content": VALUES}), min_size=1, max_size=2)
ITEMS = TOKENS | TOKENS | VALUES | MESSAGES | st.fixed_dictionaries({"text": TOKENS | VALUES})
ROWS = st.fixed_dictionaries(
    {"prompt": TOKENS | ITEMS, "candidates": st.lists(ITEMS, max_size=3) | VALUES},
    optional={"id": VALUES, "what": st.lists(SCALARS, max_size=3) | VALUES},
)


@st.composite
def damaged(draw):
    """A row in whose bytes something was removed or put."""
    data = dump(draw(ROWS))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    return data[:start] + draw(st.sampled_from([b"", b"1e999", b",", b"\r", b"\xff", b"\0"])) + data[stop:]


@settings(max_examples=150, deadline=None)
@given(st.lists(ROWS.map(dump) | damaged() | st.binary(max_size=9), min_size=1, max_size=5), st.booleans())
def test_every_row_is_answered_or_said(tiny, tmp_path_factory, engine, lines, votes):
    source = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    output = source.with_name("fuzzed.jsonl")
    # A byte order mark says of which encoding the whole file is.
    data = b"{}\n" + b"\n".join(lines)
    source.write_bytes(data)
    task = Task(artifact=str(tiny), source=str(source), answers="what" if votes else None)
    worker = Worker(task, engine)
    found = run_batch(task, output, lambda _, chunks: map(worker, chunks), rows=2, overwrite=True)
    given = {i for i, line in enumerate(data.split(b"\n"), 1) if line.strip(b" \t\r")}
    ranked = output.read_bytes().split(b"\n")[:-1]
    errors = [json.loads(line) for line in output.with_name("fuzzed.jsonl.errors.jsonl").read_bytes().splitlines()]
    assert (len(ranked), len(errors), len(ranked) + len(errors)) == (found.rows, found.bad, len(given))
    assert {error["line"] for error in errors} <= given
    kept = [line for i, line in enumerate(data.split(b"\n"), 1) if i in given - {error["line"] for error in errors}]
    for line, answer in zip(kept, ranked, strict=True):
        before, after = json.loads(line), json.loads(answer)
        assert repr(before) == repr({name: after[name] for name in before})
        assert after["best"] == before["candidates"][after["best_index"]]
        assert after["candidate_scores"][after["best_index"]] is not None


def test_fields_come_back_to_the_last_digit(batch):
    more = [
        b'"x": 0.1000000000000000055511151231257827, "y": -0, "z": 1.0e0',
        b'"x": 123456789012345678901234567890',
        rb'"x": "\ud800 \u0041 \/"',
        '"x": "\u2028\x85\ufeff"'.encode(),
        b'"x": ' + b"[" * 500 + b"]" * 500,
    ]
    lines = [dump(ROW)[:-1] + b", " + field + b" }" for field in more]
    ranked, errors = batch(lines)
    assert not errors
    for line, answer in zip(lines, ranked, strict=True):
        assert answer.startswith(line[:-2] + b', "best_index": ')
    # Numbers that no reader of JSON has room for.
    for field in (b'"x": 1e999', b'"x": [-1e999, {"y": 1E400}]'):
        ranked, errors = batch([dump(ROW)[:-1] + b", " + field + b" }", dump(ROW)])
        assert len(ranked) == 1
        assert "is out of range" in errors[1]
    numbers = b'{"prompt": [1], "candidates": [[1]], "x": ' + b"9" * 5000 + b"}"
    if hasattr(sys, "get_int_max_str_digits"):
        assert "a number of thousands of digits" in batch([numbers])[1][1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "it has no 'prompt', nor any other field"),
        ({"question": [1]}, "it has no 'prompt', only 'what', 'question'; name the field with --prompt-field"),
        (ROW | {"prompt": None}, "its 'prompt' is null"),
        (ROW | {"candidates": "[[1]]"}, "got text that holds JSON: parse it first"),
        (ROW | {"candidates": {"a": 1}}, "expected a list, with an element for each candidate; got an object"),
        (ROW | {"candidates": [[1], True]}, "'candidates', element 1: expected text, token ids"),
        (ROW | {"candidates": [[1], [True]]}, "got a list of true or false"),
        (ROW | {"prompt": [1, True]}, "'prompt': expected text, token ids"),
        (ROW | {"candidates": [[2**70]]}, "candidates[0]: "),
        (ROW | {"candidates": [[-1]]}, "token id -1 is outside the vocabulary"),
        (ROW | {"prompt": [2**63]}, "outside the vocabulary"),
        (ROW | {"candidates": [[], []]}, "none can be read"),
        (ROW | {"candidates": ["\ud800"]}, "no tokenizer"),
        (ROW | {"candidates": [[[1.0], [2.0, 3.0]]]}, "rows of one length; got 1, 2"),
        (ROW | {"what": [[1], [2]]}, "hashable"),
        (ROW | {"what": ["a"]}, "one for each of 2 candidates"),
        (ROW | {"what": "ab"}, "'what': expected a list"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row(batch, row, reason):
    what = {"what": [1, 2]}
    ranked, errors = batch([dump(ROW | what), dump(what | row if row else row), dump(ROW | what)], answers="what")
    assert len(ranked) == 2
    assert reason in errors[2]


def test_answers_that_a_row_lacks(batch):
    lines = [dump(ROW), dump(ROW | {"what": None}), dump(ROW | {"what": [1, 2]})]
    ranked, errors = batch(lines, answers="what")
    assert len(ranked) == 1
    assert "it has no 'what', only 'prompt', 'candidates'; name the field with --answers-field" in errors[1]
    assert "its 'what' is null" in errors[2]


def test_a_candidate_that_cannot_be_read_gets_null(batch, model):
    ranked, errors = batch([dump(ROW | {"candidates": [[], [3], {"text": []}]})], token_scores=True)
    found = json.loads(ranked[0])
    expected = model.rank([1, 2], [[], [3], []])
    assert found["candidate_scores"][::2] == [None, None]
    assert within(found["candidate_scores"][1], expected.candidate_scores[1], RUNTIME)
    assert (found["best_index"], found["best"], found["margin"], errors) == (1, [3], None, {})
    assert list(map(len, found["scores"])) == [0, 1, 0]


def test_encodings_and_ends_of_lines(batch):
    ranked, errors = batch(b"\xef\xbb\xbf" + dump(ROW) + b"\r\n \t\r\n" + b"\xef\xbb\xbf" + dump(ROW) + b"\n\x0b")
    assert ranked[0].startswith(dump(ROW)[:-1])
    assert "byte order mark in the midst" in errors[3]
    assert errors[4].startswith("not JSON")
    for encoding in ("UTF-16", "UTF-32"):
        with pytest.raises(bonnx.InputError, match=f"rows.jsonl: it is {encoding}"):
            batch(json.dumps(ROW).encode(encoding))


LISTS = pa.list_(pa.list_(pa.int64()))
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


def test_no_rows_are_no_success(tiny, tmp_path, capsys):
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    command = ["batch", str(tiny), str(source), "-o", str(output), "--overwrite", "--json"]
    source.write_bytes(b'{"question": [1], "candidates": [[2]]}\n' * 3)
    assert main(command) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False
    for part in (
        "no row was ranked, 3 are in",
        "out.jsonl.errors.jsonl",
        "only 'question', 'candidates'",
        "--prompt-field",
    ):
        assert part in said["reason"]
    source.write_bytes(b"")
    assert main(command) == 1
    assert "the input has none" in capsys.readouterr().err
    assert main([*command, "--prompt-field", "question"]) == 1
    source.write_bytes(b'{"question": [1], "candidates": [[2]]}\n{}\n')
    capsys.readouterr()
    assert main([*command, "--prompt-field", "question"]) == 0
    assert json.loads(capsys.readouterr().out)["bad"] == 1


def test_one_row_that_fails_does_not_end_the_others(engine, batch, monkeypatch):
    real = batch_worker.rank_all

    def rank_all(engine, requests):
        if any(len(request.candidates) == 3 for request in requests):
            raise RuntimeError("no memory")
        return real(engine, requests)

    monkeypatch.setattr(batch_worker, "rank_all", rank_all)
    large = dump(ROW | {"candidates": [[1], [2], [3]]})
    ranked, errors = batch([dump(ROW), large, dump(ROW), large])
    assert len(ranked) == 2
    assert errors == dict.fromkeys((2, 4), "ONNX Runtime cannot rank it: no memory")
    with pytest.raises(bonnx.BonnxError, match="ONNX Runtime cannot go on: no memory"):
        batch([large, large])


def interrupt(task, chunks):
    for number, result in enumerate(here(task, chunks)):
        if number == 2:
            raise KeyboardInterrupt
        yield result


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
    with pytest.raises(KeyboardInterrupt):
        run_batch(task, output, interrupt, rows=8)
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


def test_places_that_cannot_be_read_or_written(tiny, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(dump(ROW))
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.link(source, tmp_path / "link.jsonl")
    errors = tmp_path / "o.jsonl.errors.jsonl"
    errors.write_bytes(dump(ROW))
    for name, output, message in (
        ("folder.jsonl", "o.jsonl", "it is a folder"),
        ("pipe.jsonl", "o.jsonl", "no regular file"),
        ("rows.jsonl", "link.jsonl", "link.jsonl is the input"),
        ("o.jsonl.errors.jsonl", "o.jsonl", "errors.jsonl is the input"),
        ("rows.jsonl", "folder.jsonl", "expected the name of a file"),
        ("rows.jsonl", "rows.jsonl/o.jsonl", "no such folder"),
        ("rows.jsonl", "x" * 300 + ".jsonl", "cannot be written: File name too long; choose a folder that can be"),
    ):
        with pytest.raises(bonnx.InputError, match=message):
            run_batch(Task(artifact=str(tiny), source=str(tmp_path / name)), tmp_path / output, here)
    assert source.read_bytes() == errors.read_bytes() == dump(ROW)
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(bonnx.InputError, match="cannot be written: Permission denied"):
            run_batch(Task(artifact=str(tiny), source=str(source)), tmp_path / "closed/o.jsonl", here)


def test_parts_that_are_gone_are_said(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("bonnx.runtime.batch.output._SECONDS", 0.0)
    source, output = tmp_path / "rows.parquet", tmp_path / "o.parquet"
    parquet.write_table(pa.table({"prompt": [[1]] * 40, "candidates": pa.array([[[2]]] * 40, LISTS)}), source)
    task = Task(artifact=str(tiny), source=str(source))
    with pytest.raises(KeyboardInterrupt):
        run_batch(task, output, interrupt, rows=8)
    part = tmp_path / "o.parquet.part"
    (part / ".hidden").write_bytes(b"")
    assert run_batch(task, output, here, rows=8).rows == 40
    with pytest.raises(KeyboardInterrupt):
        run_batch(task, output, interrupt, rows=8, overwrite=True)
    min(part.iterdir()).unlink()
    with pytest.raises(bonnx.InputError, match="part 0 is gone"):
        run_batch(task, output, here, rows=8)


def test_one_lock_has_one_holder(tmp_path):
    """Many take a lock, see who else holds it, remove it and let it go, as runs do at their ends."""
    path, holders, together, taken = tmp_path / "o.lock", Counter(), [], Counter()

    def run(number):
        while taken[number] < 60:
            try:
                lock = _take(path, tmp_path / "o")
            except bonnx.InputError:
                continue
            holders[number] = 1
            together.append(sum(holders.values()))
            holders[number] = 0
            taken[number] += 1
            path.unlink()
            lock.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(together) == {1}
    assert not path.exists()


def test_a_lock_that_was_removed_while_it_was_opened_is_taken_anew(tmp_path, monkeypatch):
    path, real, calls = tmp_path / "o.lock", fcntl.flock, []

    def flock(file, how):
        if not calls:
            path.unlink()
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with _take(path, tmp_path / "o") as lock:
        assert len(calls) == 2
        assert os.path.samestat(os.fstat(lock.fileno()), path.stat())
        with pytest.raises(bonnx.InputError, match="another run is writing it"):
            _take(path, tmp_path / "o")

    def without(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(bonnx.InputError, match=r"o\.jsonl: cannot be written: No locks available"):
        Output(tmp_path / "o.jsonl", {}, overwrite=False)


def test_a_row_does_not_end_a_dataset(tiny, model):
    prompts, candidates = np.empty(4, object), np.empty(4, object)
    prompts[:] = [np.array([1, 2])] * 4
    good = np.empty(2, object)
    good[:] = [np.array([3]), np.array([4, 5])]
    candidates[:] = [good, None, [np.array([500])], good]
    found = Ranker(str(tiny))({"prompt": prompts, "candidates": candidates})
    expected = model.rank(**ROW)
    assert [reason is None for reason in found["reason"]] == [True, False, False, True]
    assert "outside the vocabulary" in found["reason"][2]
    assert found["best_index"] == [expected.best_index, None, None, expected.best_index]
    assert found["best"][0] == ROW["candidates"][expected.best_index]

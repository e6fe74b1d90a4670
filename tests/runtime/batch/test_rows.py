"""Whatever a row of JSON is, it is either answered or in the file of errors."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bonnx
from bonnx.runtime.batch import Task, run_batch
from bonnx.runtime.batch import worker as batch_worker
from bonnx.runtime.batch.worker import Worker
from tests.runtime.batch.rows import ROW, dump
from tests.tolerance import RUNTIME, within

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
def test_every_row_is_answered_or_named_in_the_errors(tiny, tmp_path_factory, engine, lines, votes):
    source = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    output = source.with_name("fuzzed.jsonl")
    # A byte order mark says of which encoding the whole file is.
    data = b"{}\n" + b"\n".join(lines)
    source.write_bytes(data)
    task = Task(artifact=str(tiny), source=str(source), answers="what" if votes else None)
    worker = Worker(task, engine)
    summary = run_batch(task, output, lambda _, chunks: map(worker, chunks), rows=2, overwrite=True)
    given = {i for i, line in enumerate(data.split(b"\n"), 1) if line.strip(b" \t\r")}
    ranked = output.read_bytes().split(b"\n")[:-1]
    errors = [json.loads(line) for line in output.with_name("fuzzed.jsonl.errors.jsonl").read_bytes().splitlines()]
    assert (len(ranked), len(errors), len(ranked) + len(errors)) == (summary.rows, summary.bad, len(given))
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


@pytest.mark.parametrize("field", [b'"x": 1e999', b'"x": [-1e999, {"y": 1E400}]'], ids=["alone", "nested"])
def test_numbers_that_no_reader_of_json_has_room_for(batch, field):
    ranked, errors = batch([dump(ROW)[:-1] + b", " + field + b" }", dump(ROW)])
    assert len(ranked) == 1
    assert "is out of range" in errors[1]


@pytest.mark.skipif(not hasattr(sys, "get_int_max_str_digits"), reason="this Python reads numbers of any length")
def test_a_number_of_thousands_of_digits(batch):
    numbers = b'{"prompt": [1], "candidates": [[1]], "x": ' + b"9" * 5000 + b"}"
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


def test_an_error_names_the_fields_of_the_file(batch):
    line = dump({"question": [1], "completions": [[2**70], [-1]]})
    _, errors = batch([line], prompt="question", candidates="completions")
    assert errors[1].startswith("completions[0]: ")


def test_answers_that_a_row_lacks(batch):
    lines = [dump(ROW), dump(ROW | {"what": None}), dump(ROW | {"what": [1, 2]})]
    ranked, errors = batch(lines, answers="what")
    assert len(ranked) == 1
    assert "it has no 'what', only 'prompt', 'candidates'; name the field with --answers-field" in errors[1]
    assert "its 'what' is null" in errors[2]


def test_a_candidate_that_cannot_be_read_gets_null(batch, model):
    ranked, errors = batch([dump(ROW | {"candidates": [[], [3], {"text": []}]})], token_scores=True)
    answer = json.loads(ranked[0])
    expected = model.rank([1, 2], [[], [3], []])
    assert answer["candidate_scores"][::2] == [None, None]
    assert within(answer["candidate_scores"][1], expected.candidate_scores[1], RUNTIME)
    assert (answer["best_index"], answer["best"], answer["margin"], errors) == (1, [3], None, {})
    assert list(map(len, answer["scores"])) == [0, 1, 0]


def test_encodings_and_ends_of_lines(batch):
    ranked, errors = batch(b"\xef\xbb\xbf" + dump(ROW) + b"\r\n \t\r\n" + b"\xef\xbb\xbf" + dump(ROW) + b"\n\x0b")
    assert ranked[0].startswith(dump(ROW)[:-1])
    assert "byte order mark in the middle" in errors[3]
    assert errors[4].startswith("not JSON")


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
def test_another_encoding_is_refused(batch, encoding):
    with pytest.raises(bonnx.InputError, match=f"rows.jsonl: it is {encoding}"):
        batch(json.dumps(ROW).encode(encoding))


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

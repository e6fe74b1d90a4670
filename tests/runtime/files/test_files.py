"""Files of prompts and candidates: one reading, and nothing that is neither text nor JSON is ranked."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bonnx
from bonnx.command import main
from bonnx.export.verify.agreement import HeldOut, read_held_out
from bonnx.runtime.files.lines import load_arrays, read_candidates, read_prompts
from bonnx.runtime.files.values import to_item

# What Python's splitlines, or its reading of text, takes for the end of a line.
NO_ENDS = ["\u2028", "\u2029", "\x85", "\f", "\v", "\r", "\x1c", "\x1d", "\x1e"]


@pytest.fixture
def put(tmp_path):
    def put(content):
        path = tmp_path / "file"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def everywhere(path):
    """What each command reads from a file of plain lines, none of them blank."""
    prompts = [prompt for _, prompt in read_prompts(path)]
    assert prompts == [case.prompt for case in read_held_out(path)]
    assert prompts == read_candidates(path)
    return prompts


@pytest.mark.parametrize("mark", NO_ENDS)
def test_only_line_feeds_end_a_line(put, mark):
    assert everywhere(put(f"a{mark}b\nc{mark}\r\n{mark}d")) == [f"a{mark}b", f"c{mark}", f"{mark}d"]


@given(lines=st.lists(st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), min_size=1)))
def test_text_comes_back(lines, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes("".join(f"{line}\r\n" for line in lines).encode("utf-8-sig"))
    if not any(line.startswith("\ufeff") for line in lines):
        assert read_candidates(path, literal=True) == lines
    path.write_bytes("\n".join(json.dumps(line) for line in lines).encode())
    assert everywhere(path) == lines if lines else not read_candidates(path)


def test_byte_order_marks(put):
    assert everywhere(put(b"\xef\xbb\xbfa\nb")) == ["a", "b"]
    assert read_candidates(put(b"\xef\xbb\xbf")) == read_candidates(put(b"")) == []


def all_prompts(path):
    return [*read_prompts(path)]


READERS = [read_candidates, read_held_out, all_prompts]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
def test_another_encoding_is_named(put, encoding, order, read):
    path = put(("\ufeff" + "a\nb").encode(f"{encoding}-{order}"))
    with pytest.raises(bonnx.InputError, match=f"it is {encoding}; expected UTF-8"):
        read(path)


BROKEN = {
    b'{"text": "a",}': "not JSON",
    b'["a", "b",]': "not JSON",
    b'{"text": "a"': "not JSON",
    b'["a", "b"': "not JSON",
    b'"a': "not JSON",
    b"{'text': 'a'}": "not JSON",
    b'"a" and "b"': "not JSON: Extra data",
    b'{"text": "a"} {"text": "b"}': "not JSON: Extra data",
    b"[x] is LaTeX": "as a JSON string, or pass --text",
    b"  {braces}": "not JSON",
    b"\xc2\xa0{}": "not JSON",
    b'{"text": NaN}': "NaN is not a JSON number",
    b"[[-Infinity]]": "-Infinity is not a JSON number",
    b'{"text": "a", "text": "b"}': "an object has 'text' twice",
    b'{"text": "a", "more": [{"x": 1, "x": 2}]}': "an object has 'x' twice",
    b'{"text": "a\tb"}': "not JSON: Invalid control character",
    b"[" * 100_000: "not JSON",
    b'{"question": "a"}': "it has 'question'",
    b'{"text": null}': "got null",
    b'{"text": true}': "got true or false",
    b'{"text": 1}': "got a whole number",
    b'{"text": [1, true]}': "got a list of a whole number and of true or false",
    b'{"text": [1.0]}': "a number that is not whole",
    b'{"text": [1, [2]]}': "got a list of a list and of a whole number",
    b'{"text": [[1], [2, 3]]}': "rows of one length; got 1, 2",
    b'{"text": [[1e999]]}': "the number 1e999 is out of range",
    b'{"text": [[1e39]]}': "out of range for float32",
    b'{"text": [[%d]]}' % 10**400: "out of range for float32",
    b"\xffa": "not UTF-8: invalid start byte (0xff) at byte 0 of the line",
    b"ab\xe2\x82": "at byte 2 of the line",
    b"a\0b": "NUL byte",
    b"\xef\xbb\xbfa": "a byte order mark in the middle",
}


@pytest.mark.parametrize("line", BROKEN)
def test_what_is_broken_is_refused_with_its_line(put, line):
    path = put(b"good\n\n" + line + b"\nalso good\n")
    with pytest.raises(bonnx.InputError) as found:
        read_candidates(path)
    assert f"{path}, line 3: " in str(found.value)
    assert BROKEN[line] in str(found.value)
    prompts = dict(read_prompts(path))
    assert (prompts[1], prompts[4]) == ("good", "also good")
    assert f"{path}, line 3: " in str(prompts[3])
    with pytest.raises(bonnx.InputError, match="line 3: "):
        read_held_out(path)


def test_every_line_is_text_if_one_says_so(put):
    lines = ["[x]", '{"text": "a"}', '"', "[1, 2]", " {"]
    assert read_candidates(put("\n".join(lines)), literal=True) == lines
    assert [prompt for _, prompt in read_prompts(put("\n".join(lines)), literal=True)] == lines


def test_objects_and_lists(put):
    messages = [{"role": "user", "content": "x"}]
    values = ["[x]", [1, 2], ["step", "step"], messages, "plain", []]
    lines = [json.dumps({"text": value, "id": 7}) for value in values]
    assert read_candidates(put("\n".join(lines))) == values
    assert [prompt for _, prompt in read_prompts(put("\n".join(lines)))] == values
    assert [prompt for _, prompt in read_prompts(put('{"prompt": "a"}\n[1, 2]'))] == ["a", [1, 2]]
    ((_, both),) = read_prompts(put('{"prompt": "a", "text": "b"}'))
    assert "it has both" in str(both)
    assert read_candidates(put('["a", "b"]\n[3]')) == [["a", "b"], [3]]
    assert read_candidates(put("a\n\nb\n\n")) == ["a", "", "b", ""]
    held_out = read_held_out(put('[1, 2]\n"[x]"\n{"text": "p", "candidates": ["a", {"text": "b"}]}\n'))
    assert held_out == [HeldOut([1, 2]), HeldOut("[x]"), HeldOut("p", ["a", "b"])]


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "p", "candidates": "[]"}', '{"candidates": ["a"]}', '{"prompt": "p", "candidates": [1]}'],
    ids=["candidates that are text", "no prompt", "a candidate that is a number"],
)
def test_a_held_out_prompt_that_cannot_be_read_is_named(put, line):
    with pytest.raises(bonnx.InputError, match="line 1"):
        read_held_out(put(line))


VALUES = ["a", [1, 2], {"text": "b"}]


@pytest.mark.parametrize(
    "text",
    [json.dumps(VALUES), json.dumps(VALUES, indent=1), f"\n {json.dumps(VALUES)}\n\n"],
    ids=["one line", "indented", "blank lines around it"],
)
def test_one_list_of_all_candidates(put, text):
    assert read_candidates(put(text)) == ["a", [1, 2], "b"]


def test_an_empty_list_of_candidates(put):
    assert read_candidates(put("[]")) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n"a",\n"b"', "line 3: not JSON"),
        ('[\n"a",\n]', "line 3: not JSON"),
        ('[\n"a",\n{"text": "b", "text": "c"}]', "line 3: .*twice"),
        ('[\n"a",\n[NaN]]', "line 3: .*NaN"),
        ('[\n"a", 5]', r"line 2: .*element 1 is a whole number .*\[\[1, 2, 3\]\]"),
        ('[\n"a",\nnull]', "line 3: .*element 1 is null"),
        ('[\n"a",\n{"x": 1}]', "line 3: expected an object with 'text'"),
        ('["a"]]', "line 1: not JSON: Extra data"),
    ],
)
def test_a_list_with_an_error_names_its_line(put, text, message):
    with pytest.raises(bonnx.InputError, match=message):
        read_candidates(put(text))


def test_embeddings_are_float32(rng):
    values = rng.standard_normal((3, 4))
    item = to_item(values.tolist())
    assert item.dtype == np.float32
    assert np.array_equal(item, values.astype(np.float32))


@pytest.mark.parametrize("name", ["empty.npy", "cut.npz", "text.npy", "zip.npz", "pickled.npy", "none.npy"])
def test_arrays_that_cannot_be_read(tmp_path, rng, name):
    np.savez(tmp_path / "whole.npz", a=rng.standard_normal(3))
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "pickled.npy", np.array([{}], object))
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npy").write_bytes(b"text")
    (tmp_path / "zip.npz").write_bytes(b"PK\x03\x04" + b"x" * 50)
    with pytest.raises(bonnx.InputError, match=f"cannot read .*{name}"):
        load_arrays(tmp_path / name)


def test_arrays_of_other_names_are_refused(tmp_path, rng):
    np.savez(tmp_path / "good.npz", a=rng.standard_normal(3))
    with pytest.raises(bonnx.InputError, match="expected an array 'prompts'; got a"):
        read_held_out(tmp_path / "good.npz")


@pytest.mark.parametrize("place", ["", "none"], ids=["a folder", "nothing"])
@pytest.mark.parametrize("read", READERS)
def test_what_is_not_a_file_is_refused(tmp_path, read, place):
    with pytest.raises(bonnx.InputError, match="cannot read"):
        read(tmp_path / place)


def test_rank_reads_prompts_as_it_reads_lines(countdown, put, capsys):
    path = str(put('"12-3=9;"\n{"text": "12-7=5;"}\n'))
    rank = ["rank", str(countdown), "--candidates", path, "--json", "--prompt"]
    expected = bonnx.load(countdown).rank("3,7,12,25>98:", ["12-3=9;", "12-7=5;"])
    for prompt in ("3,7,12,25>98:", '{"prompt": "3,7,12,25>98:"}', '"3,7,12,25>98:"'):
        assert main([*rank, prompt]) == 0
        ranking = json.loads(capsys.readouterr().out)
        assert np.allclose(ranking["candidate_scores"], expected.candidate_scores, atol=1e-6)
    assert main([*rank, '[{"role": "user",}]']) == 2
    assert "--prompt: not JSON" in capsys.readouterr().err
    # As text it gets as far as the tokenizer, which knows no letters.
    assert main([*rank, "3", "--text"]) == 2
    assert "not JSON" not in capsys.readouterr().err


def test_rank_shows_a_candidate_in_one_line_that_steers_no_terminal(countdown, put, capsys):
    path = str(put(r'["12-3=9;", "1\u001b[2J\r\n\u2028\u009b1m\u202e2", "1\u3000\u00e9"]'))
    assert main(["rank", str(countdown), "--candidates", path, "--prompt", "3,7,12,25>98:"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 4
    assert r"1\x1b[2J\r\n\u2028\x9b1m\u202e2" in lines[1]
    assert "1\u3000\u00e9" in lines[2]


def test_a_bad_line_of_prompts_does_not_end_a_run(countdown, put, capsys, monkeypatch):
    path = put('3,7,12,25>98:\n\n{"prompt": "3,7,12,25>98:",}\nx\n"3,7,12,25>98:"\n')
    generate = ["generate", str(countdown), "-n", "2", "--max-new-tokens", "4", "--json"]
    expected = bonnx.load(countdown).generate("3,7,12,25>98:", n=2, max_new_tokens=4)
    for more in (["--prompts", str(path)], ["--prompts", "-"], ["--prompts", str(path), "--method", "best_of_n"]):
        with path.open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert main([*generate, *more]) == 1
        said, told = capsys.readouterr()
        first, broken, unknown, last = map(json.loads, said.splitlines())
        assert first["candidates"] == last["candidates"]
        assert first["best"] == last["best"] == expected.best.text
        assert [(answer["ok"], answer["line"], answer["error"]) for answer in (broken, unknown)] == [
            (False, 3, "InputError"),
            (False, 4, "InputError"),
        ]
        assert "line 3: not JSON" in told
        assert "line 4: prompt" in told
        assert "2 of the prompts" in told
    assert main([*generate, "--prompts", str(path), "--temperature", "-1"]) == 2
    assert "temperature" in capsys.readouterr().err
    assert main([*generate, "--prompts", str(put("\ufeffx".encode("utf-16-le")))]) == 2
    assert "UTF-16" in capsys.readouterr().err
    assert main(["generate", str(countdown), "[1, 2"]) == 2
    assert "prompt: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('"open', "not JSON: Unterminated string starting at column 1;"),
        ('["a\tb"]', "not JSON: Invalid control character at column 4;"),
        ("[" * 100_000, "not JSON that can be read: it is nested too deeply"),
        ("[" + "1" * 5000 + "]", "not JSON that can be read: a number of thousands of digits"),
    ],
)
def test_broken_json_is_named_in_plain_words(tmp_path, text, reason):
    path = tmp_path / "candidates"
    path.write_text(text)
    with pytest.raises(bonnx.InputError, match=f"line 1: {reason}"):
        read_candidates(path)

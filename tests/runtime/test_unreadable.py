"""One candidate that cannot be read does not end a request: it is NaN, it cannot win, and the answer says why."""

import json

import numpy as np
import pytest

import bonnx
from bonnx import InputError
from bonnx.command import main
from bonnx.models.countdown.vocabulary import END, encode
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.rank.request import read_request
from bonnx.runtime.rank.run import rank_all
from tests.tolerance import RUNTIME, within

PUZZLE = "3,7,12,25>98:"
GOOD = ["12-3=9;9*7=63;", "12+3=15;", "25+7=32;"]
NO_TOKENS = "it has no tokens"
UNENCODABLE = {
    "12^3": r"the vocabulary has no token for '^' (at character 2)",
    "1+\ud800": r"expected Unicode text; '\ud800' is half of a surrogate pair (at character 2)",
}


@pytest.fixture(scope="module")
def puzzles(countdown):
    return bonnx.load(countdown)


def with_holes(rng, good, bad):
    """Good items among bad ones, in any order: the items, and the places of the good and the bad ones."""
    order = rng.permutation(len(good) + len(bad))
    items = [[*good, *bad][i] for i in order]
    places = [int(np.flatnonzero(order == i)[0]) for i in range(len(items))]
    return items, places[: len(good)], places[len(good) :]


def check(found, scores, alone, good, bad):
    """What was found with holes is what was found without them."""
    assert within(scores[good], alone, RUNTIME)
    assert np.isnan(scores[bad]).all()
    assert sorted(found.unreadable) == sorted(bad)
    assert [len(found.scores[i]) for i in bad] == [0] * len(bad)
    assert found.best_index == good[int(np.argmax(alone))]
    assert set(found.order[len(good) :]) == set(bad)


def test_an_unreadable_candidate_cannot_win_and_says_why(puzzles):
    ranking = puzzles.rank(PUZZLE, ["", GOOD[0], "^"])
    assert ranking.best == GOOD[0]
    assert np.isnan(ranking.candidate_scores).tolist() == [True, False, True]
    assert ranking.unreadable == {
        0: "it has no tokens; expected at least one",
        2: "the vocabulary has no token for '^' (at character 0)",
    }


def test_a_reason_is_short_even_if_the_piece_without_token_is_long(puzzles):
    found = puzzles.rank(PUZZLE, [GOOD[0], "1" * 100_000])
    assert "the vocabulary has no token for '111" in found.unreadable[1]
    assert len(found.unreadable[1]) < 150


@pytest.mark.parametrize("aggregation", ["last", "min", "step_mean"])
def test_texts(puzzles, rng, aggregation):
    alone = puzzles.rank(PUZZLE, GOOD, aggregation=aggregation)
    items, good, bad = with_holes(rng, GOOD, ["", [], (), *UNENCODABLE])
    found = puzzles.rank(PUZZLE, items, aggregation=aggregation)
    check(found, found.candidate_scores, alone.candidate_scores, good, bad)
    for i in bad:
        assert found.unreadable[i].startswith(UNENCODABLE.get(items[i], NO_TOKENS) if items[i] else NO_TOKENS)
    alone = puzzles.score([PUZZLE + text for text in GOOD], aggregation=aggregation)
    rows = [PUZZLE + item if i in good else item for i, item in enumerate(items)]
    found = puzzles.score(rows, aggregation=aggregation, backbone=True)
    check(found, found.row_scores, alone.row_scores, good, bad)
    assert [len(found.backbone[i]) for i in bad] == [0] * len(bad)


IDS = [[*encode(text), END] for text in GOOD]


@pytest.mark.parametrize(
    ("prompt", "readable", "unreadable"),
    [
        pytest.param(encode(PUZZLE), IDS, [[], np.zeros(0, np.int64)], id="ids after ids"),
        pytest.param(PUZZLE, [IDS[0], *GOOD[1:]], ["", [], "^"], id="ids and texts after a text"),
        pytest.param(encode(PUZZLE), GOOD, ["", "^"], id="texts after ids"),
    ],
)
def test_ids_and_texts_beside_ids(puzzles, rng, prompt, readable, unreadable):
    alone = puzzles.rank(PUZZLE, IDS).candidate_scores
    items, good, bad = with_holes(rng, readable, unreadable)
    found = puzzles.rank(prompt, items)
    check(found, found.candidate_scores, alone, good, bad)


@pytest.mark.parametrize("aggregation", ["last", "step_max"])
def test_embeddings(model, rng, aggregation):
    prompt, *own = (rng.standard_normal((length, 12)).astype(np.float32) for length in (4, 3, 1, 6))
    items, good, bad = with_holes(rng, own, [own[0][:0], []])
    marks = [[1] * len(item) for item in items] if aggregation == "step_max" else None
    alone = model.rank(prompt, own, aggregation=aggregation, step_masks=marks and [marks[i] for i in good])
    found = model.rank(prompt, items, aggregation=aggregation, step_masks=marks)
    check(found, found.candidate_scores, alone.candidate_scores, good, bad)


def test_rows_of_embeddings(model, rng):
    own = [rng.standard_normal((length, 12)).astype(np.float32) for length in (3, 1, 6)]
    items, good, bad = with_holes(rng, own, [own[0][:0], []])
    alone = model.score(own)
    found = model.score(items)
    check(found, found.row_scores, alone.row_scores, good, bad)


def test_joint_runs(countdown):
    engine = open_engine(countdown)
    puzzles = bonnx.Model(engine)
    lists = [["", GOOD[0], "^"], [GOOD[1], []], GOOD]
    together = rank_all(engine, [read_request(engine, PUZZLE, items) for items in lists])
    for items, found in zip(lists, together, strict=True):
        alone = puzzles.rank(PUZZLE, items)
        assert within(
            found.candidate_scores[~np.isnan(found.candidate_scores)],
            [score for score in alone.candidate_scores if not np.isnan(score)],
            RUNTIME,
        )
        assert (found.best_index, found.unreadable) == (alone.best_index, alone.unreadable)
    assert [sorted(found.unreadable) for found in together] == [[0, 2], [1], []]


def test_votes_do_not_count_them(puzzles):
    """An extractor never sees what cannot be read; an answer that is given for it does not count."""
    items = ["", *GOOD, [], "^"]
    found = puzzles.rank(PUZZLE, items, vote="majority", answers=lambda text: text[0])
    assert found.answers == (None, "1", "1", "2", None, None)
    assert found.best_index in (1, 2)
    assert puzzles.rank(PUZZLE, items, answers="number", vote="weighted").answers == (
        None,
        "63",
        "15",
        "32",
        None,
        None,
    )
    answers = ["a", "b", "c", "b", "a", "a"]
    found = puzzles.rank(PUZZLE, items, vote="majority", answers=answers)
    assert found.best_index in (1, 3)
    assert np.isnan(found.group_scores[[0, 4, 5]]).all()


@pytest.mark.parametrize(
    "bad", [None, 3, 0.5, {"role": "user"}, {1}, b"1+1", [0.5], [[1], [2, 3]], [1012], ["1", None]]
)
def test_mistakes_of_type_end_the_call(puzzles, bad):
    for call in (lambda items: puzzles.rank(PUZZLE, items), puzzles.score):
        with pytest.raises(InputError, match=r"\[1\]"):
            call([GOOD[0], bad, ""])


def test_the_fake_model_does_alike():
    seen = []
    fake = bonnx.FakeModel(lambda prompt, candidate: seen.append(candidate) or len(candidate))
    found = fake.rank("p", ["", "ab", [], "abc"])
    assert (seen, found.best_index, sorted(found.unreadable)) == (["ab", "abc"], 3, [0, 2])
    assert np.isnan(found.candidate_scores[[0, 2]]).all()
    with pytest.raises(InputError, match="none can be read"):
        fake.rank("p", ["", []])


def test_the_command_says_it(countdown, tmp_path, capsys):
    (tmp_path / "candidates").write_text(f"{GOOD[0]}\n\n12^3\n")
    command = ["rank", str(countdown), "--prompt", PUZZLE, "--candidates", str(tmp_path / "candidates")]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("*")
    assert lines[1].split(maxsplit=1) == ["nan", "(cannot be read: it has no tokens; expected at least one)"]
    assert lines[2].endswith("12^3 (cannot be read: the vocabulary has no token for '^' (at character 2))")
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["candidate_scores"][1:], sorted(found["unreadable"])) == ([None, None], ["1", "2"])
    (tmp_path / "candidates").write_text("\n\n")
    assert main(command) == 2
    assert "none can be read: candidates[0]: it has no tokens" in capsys.readouterr().err

"""Whatever a caller passes that is of the wrong type is an `InputError` that names it, never another exception."""

import math
from decimal import Decimal

import numpy as np
import pytest

import bonnx
from bonnx import BonnxError, InputError
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.rank.request import read_request
from bonnx.runtime.rank.run import rank_all

PUZZLE, CANDIDATES = "3,7,12,25>98:", ["12-3=9;", "12+3=15;"]


HUGE = 10**400  # no float


class Unhashable:
    __hash__ = None


def junk():
    """One of each kind of thing that a caller might hold in his hands; a generator can be read once."""
    yield from (None, "x", "", b"x", bytearray(b"x"), True, 3, -1, 0, 2.5, math.nan, math.inf, 2**70, HUGE, 1j)
    yield from ({}, {"a": 1}, set(), {1}, [], [None], [{}], ["a", 1], (), object(), Unhashable(), Decimal(1))
    yield from (np.float32(1), np.int64(3), np.complex64(1), np.zeros((2, 2, 2, 2)), np.array(["a"]))
    yield from (np.array([None, 1]), "\ud800", "\0", (text for text in CANDIDATES))


@pytest.fixture(scope="module")
def puzzle_engine(countdown):
    return open_engine(countdown)


@pytest.fixture(scope="module")
def puzzles(puzzle_engine):
    return bonnx.Model(puzzle_engine)


@pytest.fixture(scope="module")
def fake():
    return bonnx.FakeModel(lambda prompt, candidate: 1.0, lambda prompt, i: "ab")


def whole(least, most=2**63):
    return lambda v: isinstance(v, int | np.integer) and not isinstance(v, bool) and least <= v < most


def real(fits):
    def accepts(value):
        known = isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)
        return known and not (isinstance(value, int) and value >= HUGE) and fits(float(value))

    return accepts


def nothing(value):
    return False


def flag(value):
    return isinstance(value, bool)


def listed(value):
    """Lists of nothing: they hold no wrong item."""
    return isinstance(value, list | tuple) and not len(value)


def texts(value):
    """Lists that hold a text first, and a text or a token id after it."""
    return listed(value) or (isinstance(value, np.ndarray | list) and np.ndim(value) == 1 and value[0] == "a")


SEED = whole(-(2**63))
SAMPLING = {
    "max_new_tokens": whole(1, 64),
    "temperature": real(lambda v: 0 <= v < math.inf),
    "top_k": whole(0),
    "top_p": real(lambda v: 0 < v <= 1),
    "seed": SEED,
    "stop": listed,
    "aggregation": nothing,
}
GENERATE = {**SAMPLING, "n": whole(1, 65), "prune_every": whole(0), "prune_keep": SAMPLING["top_p"]}
DEADLINE = {"deadline": real(lambda v: v > 0), "on_progress": nothing}
RANK = {"aggregation": nothing, "step_masks": nothing, "partial": flag, "truncate": flag, "vote": nothing}


def check(call, accepts, name, *, optional):
    for value in junk():
        if accepts(value) or (value is None and optional):
            call(value)
            continue
        with pytest.raises(BonnxError) as caught:
            call(value)
        assert isinstance(caught.value, InputError), (name, value)


@pytest.mark.parametrize("name", RANK)
def test_options_of_rank_and_score(puzzles, fake, name):
    calls = [lambda v: puzzles.rank(PUZZLE, CANDIDATES, **{name: v})]
    if name != "truncate":
        calls.append(lambda v: puzzles.score(CANDIDATES, **{name: v}))
        calls.append(lambda v: fake.rank(PUZZLE, CANDIDATES, **{name: v}))
    for call in calls:
        check(call, RANK[name], name, optional=name in ("aggregation", "step_masks"))


def test_answers(puzzles, fake):
    fits = lambda v: isinstance(v, list | np.ndarray) and len(v) == 2 and np.ndim(v) == 1  # noqa: E731
    for model in (puzzles, fake):
        check(lambda v: model.rank(PUZZLE, CANDIDATES, vote="majority", answers=v), fits, "answers", optional=False)  # noqa: B023


@pytest.mark.parametrize("name", [*GENERATE, *DEADLINE])
def test_options_of_generate(puzzles, fake, name):
    for model in (puzzles, fake):
        options = {"max_new_tokens": 1} | ({} if name != "prune_every" else {"n": 2})
        fits = (GENERATE | DEADLINE)[name]
        if model is fake and name == "stop":
            # It has no vocabulary.
            fits = texts
        check(lambda v: model.generate(PUZZLE, **{**options, name: v}), fits, name, optional=True)  # noqa: B023


@pytest.mark.parametrize("name", ["method", "budget", "vote", "scorer", "policy", "answers", "deadline", *SAMPLING])
def test_options_of_search(puzzles, name):
    fits = {"budget": whole(1, 65), **SAMPLING, **DEADLINE}.get(name, nothing)
    call = lambda v: puzzles.search(PUZZLE, **{"budget": 2, "max_new_tokens": 1, name: v})  # noqa: E731
    check(call, fits, name, optional=name not in ("method", "budget"))


@pytest.mark.parametrize(
    ("method", "name", "fits"),
    [
        ("self_certainty", "power", real(lambda v: 0 <= v <= 8)),
        ("adaptive", "batch", whole(1)),
        ("adaptive", "price", real(lambda v: v > 0)),
        ("adaptive", "ceiling", real(math.isfinite)),
        ("adaptive", "rule", nothing),
        ("pruned", "every", whole(1)),
        ("pruned", "keep", SAMPLING["top_p"]),
        ("beam", "width", whole(1)),
        ("beam", "distinct", flag),
        ("beam", "rounds", whole(1)),
        ("dvts", "width", whole(1)),
    ],
)
def test_settings_of_methods(puzzles, method, name, fits):
    call = lambda v: puzzles.search(PUZZLE, method, 4, max_new_tokens=1, **{name: v})  # noqa: E731
    check(call, fits, name, optional=False)


def test_prompts_and_candidates(puzzles, model, fake):
    empty = lambda v: isinstance(v, str | list | tuple) and not len(v)  # noqa: E731 - one that cannot be read
    text = lambda v: empty(v) or (isinstance(v, str) and v in ("x", "\ud800", "\0"))  # noqa: E731
    embeddings = np.zeros((2, 12), np.float32)
    check(lambda v: puzzles.rank(v, CANDIDATES), nothing, "prompt", optional=False)
    check(lambda v: puzzles.rank(PUZZLE, v), nothing, "candidates", optional=False)
    check(lambda v: puzzles.rank(PUZZLE, [v, *CANDIDATES]), text, "candidates[0]", optional=False)
    check(puzzles.score, nothing, "rows", optional=False)
    check(lambda v: puzzles.score([*CANDIDATES, v]), text, "rows[2]", optional=False)
    check(puzzles.generate, nothing, "prompt", optional=False)
    check(puzzles.search, nothing, "prompt", optional=False)
    check(lambda v: model.rank(v, [embeddings]), nothing, "prompt", optional=False)
    check(lambda v: model.rank(embeddings, v), nothing, "candidates", optional=False)
    check(lambda v: model.rank(embeddings, [embeddings, v]), listed, "candidates[1]", optional=False)
    masks = lambda v: model.rank(embeddings, [embeddings], aggregation="step_min", step_masks=[v])  # noqa: E731
    check(masks, listed, "step_masks[0]", optional=False)
    for value in junk():
        if not isinstance(value, str | list | tuple | np.ndarray):
            for arguments in ((value, ["a"]), ("p", value), ("p", ["a", value])):
                with pytest.raises(InputError):
                    fake.rank(*arguments)


def test_models_and_requests(puzzle_engine, small):
    check(lambda v: bonnx.FakeModel(v), callable, "score", optional=False)
    check(lambda v: bonnx.FakeModel(len, aggregation=v), nothing, "aggregation", optional=False)
    check(lambda v: bonnx.load(small, provider=v), nothing, "provider", optional=False)
    check(lambda v: bonnx.load(small, threads=v), whole(1, 2**31), "threads", optional=True)
    check(lambda v: rank_all(puzzle_engine, v), listed, "requests", optional=False)
    requests = [read_request(puzzle_engine, PUZZLE, CANDIDATES)] * 2
    check(lambda v: rank_all(puzzle_engine, requests, tokens=v), whole(1), "tokens", optional=False)
    check(puzzle_engine.reader.pieces, listed, "tokens", optional=False)
    for value in junk():
        for call in (bonnx.load, bonnx.verify):
            with pytest.raises(BonnxError):
                call(value)


def test_marks_that_would_not_be_read_are_refused(model):
    """They would change nothing, and who passes them thinks otherwise."""
    embeddings = np.zeros((2, 12), np.float32)
    with pytest.raises(InputError, match="step_masks: aggregation 'last' does not read them"):
        model.rank(embeddings, [embeddings], step_masks=[[0, 1]])


@pytest.mark.parametrize("given", [None, "1", "x", [], [[1, 2]], [[1], [2, 3]], 1j, {"a": 1}, [1, None], object()])
def test_a_fake_model_refuses_scores_that_are_no_numbers(given):
    with pytest.raises(
        InputError, match=r"score of candidates\[0\]: expected a number, or a list with one for each token"
    ):
        bonnx.FakeModel(lambda prompt, candidate: given).rank("p", ["a", "b"])


@pytest.mark.parametrize("given", [True, 1, np.float16(1), np.array(1.0), np.array([2.0, 1.0]), (2, 1)])
def test_a_fake_model_takes_numbers_of_any_kind(given):
    assert bonnx.FakeModel(lambda prompt, candidate: given).rank("p", ["a"]).candidate_scores.tolist() == [1.0]


def test_a_fake_model_refuses_what_completes_no_text():
    with pytest.raises(InputError, match="complete: expected a text for candidate 1; it gave None"):
        bonnx.FakeModel(lambda prompt, text: 1.0, lambda prompt, i: "a" if i == 0 else None).generate("p", n=2)

"""Bodies are documented and checked by the one definition of the sampling options."""

import pytest

from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.generate.options import DEFAULTS, option_bounds, option_help

NUMBERS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
KEYS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


@pytest.fixture(scope="module")
def engine(tiny):
    return open_engine(tiny)


@pytest.fixture
def fields(client):
    """The fields of `/v1/best-of-n` in the OpenAPI document."""
    return client.get("/openapi.json").json()["components"]["schemas"]["BestOfNBody"]["properties"]


@pytest.mark.parametrize("name", NUMBERS)
def test_the_document_shows_each_option_as_it_is_defined(fields, name):
    shown = fields[name]
    number = next(kind for kind in shown.get("anyOf", [shown]) if kind["type"] != "null")
    assert number["type"] == ("number" if name in ("temperature", "top_p") else "integer")
    assert {key: number.get(key) for key in KEYS.values()} == {
        # JSON has no integers but numbers: 2^63 - 1 comes as the float next to it.
        KEYS[bound]: None if value is None else float(value)
        for bound, value in option_bounds(name).items()
    }
    assert shown.get("default") == DEFAULTS[name]
    assert shown["description"] == option_help(name)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", -1, "a number of at least 0 and at most 3.4e38; got -1"),
        ("temperature", "hot", "a number of at least 0 and at most 3.4e38; got 'hot'"),
        ("top_p", 0, "a number above 0 and at most 1; got 0"),
        ("top_k", -1, "a whole number of at least 0; got -1"),
        ("top_k", 2**63, "a whole number of at least 0 and below 2^63; got 9223372036854775808"),
        ("max_new_tokens", 1.5, "a whole number of at least 1; got 1.5"),
        ("n", 0, "a whole number of at least 1; got 0"),
        ("deadline", 0, "a number above 0; got 0"),
        ("stream", "x", "true or false; got 'x'"),
        ("vote", "loud", "'score', 'weighted' or 'majority'; got 'loud'"),
    ],
)
def test_a_value_out_of_bounds_is_refused_as_in_python(client, name, value, words):
    answer = client.post("/v1/best-of-n", json={"prompt": [1, 2], "n": 1} | {name: value})
    assert answer.status_code == 400
    assert answer.json()["message"] == f"{name}: expected {words}"


def test_an_option_may_be_left_out_or_null_but_not_sent_with_candidates(client):
    body = {"prompt": [1, 2], "n": 1, "max_new_tokens": 2, "temperature": None}
    generated = client.post("/v1/best-of-n", json=body)
    assert generated.status_code == 200, generated.text
    refused = client.post("/v1/best-of-n", json={"prompt": [1, 2], "candidates": [[3]], "temperature": 1.0})
    assert refused.json()["message"] == "temperature: belongs to generation; leave it out with candidates"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"foo": 1}, "unknown field 'bonnx.foo'; known fields: "),
        ({"vot": "majority"}, "unknown field 'bonnx.vot'; did you mean 'vote'?"),
        ({"vote": "x"}, "bonnx.vote: expected 'score', 'weighted' or 'majority'; got 'x'"),
        ({"deadline": -1}, "bonnx.deadline: expected a number above 0; got -1"),
        ({"method": "beam", "rounds": 0}, "bonnx.rounds: expected a whole number of at least 1; got 0"),
        ({"method": "beam", "width": 0}, "bonnx.width: expected a whole number of at least 1, or 'sqrt'; got 0"),
        ({"method": "beam", "width": "x"}, "bonnx.width: expected a whole number of at least 1, or 'sqrt'; got 'x'"),
        ({"answers": "regex:a"}, "bonnx.answers: expected 'boxed' or 'number'"),
        ([], "bonnx: expected a JSON object; got []"),
    ],
    ids=repr,
)
def test_a_field_of_an_object_is_refused_in_the_same_words(client, fields, message):
    answer = client.post("/v1/completions", json={"prompt": "a", "bonnx": fields})
    assert answer.status_code == 400
    assert answer.json()["message"].startswith(message)

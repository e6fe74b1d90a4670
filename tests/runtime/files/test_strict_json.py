"""One rule for JSON, whoever sends it: files and HTTP read the same texts, and refuse the same ones."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bonnx.errors import InputError
from bonnx.runtime.files.strict_json import parse_json
from bonnx.runtime.serve import json_route
from bonnx.runtime.serve.errors import ApiError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
)
REFUSED = {
    "name twice": ('{"a": 1, "a": 2}', "an object has 'a' twice"),
    "name twice inside": ('[{"x": {"a": 1, "a": 1}}]', "an object has 'a' twice"),
    "nan": ("[NaN]", "NaN is not a JSON number"),
    "infinity": ("-Infinity", "-Infinity is not a JSON number"),
    "beyond float64": ('{"a": 1e999}', "the number 1e999 is out of range"),
    "thousands of digits": ("1" * 5000, "a number of thousands of digits"),
    "depth": ("[" * 100_000, "nested too deeply"),
    "comma": ("[1,]", "not JSON"),
    "two values": ("1 2", "not JSON: Extra data"),
}


@given(VALUES)
def test_what_json_holds_is_read_alike(value):
    text = json.dumps(value)
    assert parse_json(text) == json_route.parse_json(text.encode()) == value


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_readers_would_read_differently_is_refused_alike(text, message):
    with pytest.raises(InputError, match=message):
        parse_json(text)
    with pytest.raises(ApiError, match=message):
        json_route.parse_json(text.encode())

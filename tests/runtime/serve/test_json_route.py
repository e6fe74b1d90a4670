"""Bodies, methods and paths as nobody should send them: always a JSON error with a 4xx, and the server goes on."""

import gzip
import json
import zlib

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.serve import Settings
from tests.runtime.serve.servers import served

PATHS = {
    "/v1/best-of-n": {"prompt": [1, 2], "candidates": [[3], [4, 5]]},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v1/score": {"text_1": "a", "text_2": ["b"]},
    "/v2/models/tiny_rank/infer": {"inputs": []},
}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def client(tiny):
    with (
        served(open_engine(tiny), Settings(max_body=300_000)) as url,
        httpx.Client(base_url=url, timeout=60, follow_redirects=False) as client,
    ):
        yield client


def check(answer, *statuses):
    """An error that says what was expected, as JSON, and nothing of the inside."""
    assert answer.status_code in statuses, (answer.status_code, answer.text[:300])
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()
    message = error["error"] if isinstance(error["error"], str) else error["message"]
    assert message
    assert not any(word in answer.text for word in ("Traceback", "/tmp", ".py", "pydantic"))
    return message


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"null", "expected|Expected"),
        (b"[]", "expected|Expected"),
        (b'"text"', "expected|Expected"),
        (b"{", "JSON"),
        (b'{"a": 1,}', "JSON"),
        (b"{'a': 1}", "JSON"),
        (b'{"a": 1} {}', "JSON"),
        (b"\xff\xfe{\x00}\x00", "UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 40_000, "nested"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
    ],
)
def test_what_is_no_json(client, path, body, message):
    answer = client.post(path, content=body, headers=JSON)
    error = check(answer, 400)
    assert any(word in error for word in message.split("|")), error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": [1], "n": 1, "temperature": NaN}', "the body is not JSON that can be read: NaN"),
        ('{"prompt": [1], "n": 1, "temperature": -Infinity}', "the body is not JSON that can be read: -Infinity"),
        ('{"prompt": [1], "n": 1, "temperature": 1e999}', "the number 1e999 is out of range"),
        ('{"prompt": [[1e999]], "n": 1}', "out of range"),
        ('{"prompt": [{"role": "user", "content": "a", "weight": -1e999}], "n": 1}', "out of range"),
        ('{"prompt": [[1e300]], "candidates": [[[1]]]}', "prompt: a number is out of range for float32"),
        (
            '{"prompt": [1], "candidates": [[2], [[1.0], [1e39]]]}',
            "candidates[1]: a number is out of range for float32",
        ),
        ('{"prompt": [1], "n": 1, "n": 2}', "an object has 'n' twice"),
        ('{"prompt": [{"role": "user", "role": "user", "content": "a"}], "n": 1}', "an object has 'role' twice"),
        ('{"prompt": [1], "n": 1, "seed": 9223372036854775808}', "seed: "),
        ('{"prompt": [9223372036854775808], "n": 1}', "outside the vocabulary"),
        ('{"prompt": [' + "9" * 400 + '], "n": 1}', "prompt: expected"),
        (
            '{"prompt": [1], "candidates": [[1]], "answers": [' + "9" * 30 + '], "vote": "majority"}',
            "answers: expected",
        ),
        ('{"prompt": [1], "n": ' + "9" * 30 + "}", "n: "),
        ('{"prompt": [1], "n": 1, "max_new_tokens": ' + "9" * 30 + "}", "max_new_tokens: "),
        ('{"prompt": [1], "n": 1, "stop": [' + "9" * 30 + "]}", "stop"),
        ('{"prompt": [1], "n": 1, "stop": [-1]}', "stop: token id -1 is outside"),
        ('{"prompt": [true], "n": 1}', "prompt: expected"),
        ('{"prompt": [1.5], "n": 1}', "prompt: expected"),
        ('{"prompt": [], "n": 1}', "prompt: "),
        ('{"prompt": [1], "candidates": [[]]}', "candidates[0]: it has no tokens"),
        ('{"prompt": [1], "candidates": [[[]]]}', "candidates[0]: "),
        ('{"prompt": "a", "n": 1, "stop": "a"}', "no tokenizer"),
        ('{"prompt": [1], "n": 1, "model": "\\ud800"}', "this server has"),
    ],
)
def test_values_that_nothing_holds(client, text, message):
    answer = client.post("/v1/best-of-n", content=text.encode(), headers=JSON)
    assert message in check(answer, 400, 404)


def test_a_byte_order_mark_is_passed_over(client):
    body = json.dumps(PATHS["/v1/best-of-n"]).encode()
    plain = client.post("/v1/best-of-n", content=body, headers=JSON).json()
    marked = client.post("/v1/best-of-n", content=b"\xef\xbb\xbf" + body, headers=JSON).json()
    assert marked["candidates"] == plain["candidates"]


def test_an_answer_may_hold_half_a_surrogate_pair(client):
    """Whatever comes back to the client can be written."""
    body = PATHS["/v1/best-of-n"] | {"vote": "majority", "answers": ["\ud800", None]}
    answer = client.post("/v1/best-of-n", content=json.dumps(body), headers=JSON)
    assert answer.status_code in (200, 400)
    assert answer.json()


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"]
)
@pytest.mark.parametrize("path", ["/v1/best-of-n", "/v1/rerank", "/v1/score"])
def test_other_content_types(client, path, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = client.post(path, content=json.dumps(PATHS[path]).encode(), headers=headers)
    assert "Content-Type: application/json" in check(answer, 415)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json"])
def test_content_types_that_are_json(client, kind):
    body = json.dumps(PATHS["/v1/best-of-n"]).encode()
    assert client.post("/v1/best-of-n", content=body, headers={"Content-Type": kind}).status_code == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("encoding", "compress"),
    [
        ("gzip", gzip.compress),
        ("gzip", lambda body: gzip.compress(b" " * 10_000_000)),
        ("deflate", zlib.compress),
        ("br", lambda body: b"x"),
    ],
    ids=["gzip", "bomb", "deflate", "brotli"],
)
def test_compressed_bodies_are_named(client, path, encoding, compress):
    data = compress(json.dumps(PATHS[path]).encode())
    answer = client.post(path, content=data, headers=JSON | {"Content-Encoding": encoding})
    assert f"Content-Encoding: bodies are read as they come; got '{encoding}'" in check(answer, 415)
    assert answer.headers["accept-encoding"] == "identity"


def test_a_body_that_says_that_it_is_not_compressed(client):
    body = json.dumps(PATHS["/v1/best-of-n"]).encode()
    answer = client.post("/v1/best-of-n", content=body, headers=JSON | {"Content-Encoding": "identity"})
    assert answer.status_code == 200


@pytest.mark.parametrize("path", [*PATHS, "/health", "/metrics", "/v2", "/v2/models/tiny_rank"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "POST", "TRACE", "FROB"])
def test_other_methods(client, path, method):
    takes = "POST" if path in PATHS else "GET"
    answer = client.request(method, path, headers=JSON)
    if method == "FROB":
        assert "this is none" in check(answer, 400)
        return
    if method == takes:
        assert answer.status_code in (200, 400)
        return
    assert answer.status_code == 405
    assert takes in answer.headers["allow"]
    if method == "HEAD":
        assert not answer.content
    else:
        assert f"does not take {method}" in check(answer, 405)


PLACES = """
/ /v1 /v1/ /v1/rerank2 /v1/best-of-n%00 /v2/models/other /v2/models/other/infer /%ff /é /docs/files/../app
/v2/models/tiny_rank/versions/2 /v2/models/tiny_rank/versions/x/infer
"""


@pytest.mark.parametrize("path", [*PLACES.split(), "/" + "a" * 5000])
def test_other_paths(client, path):
    check(client.get(path), 404, 405)
    # A text that is posted to the address itself is scored.
    check(client.post(path, json={}), *([400] if path == "/" else [404, 405]))


@pytest.mark.parametrize("wrong", [None, 5, [], {"txt": "a"}])
def test_an_element_that_is_no_document_is_named(client, wrong):
    answer = client.post("/v1/rerank", json={"query": "3,7,20,24>1:", "documents": ["1", wrong]})
    assert answer.status_code == 400
    assert "documents[1] is not one of these" in answer.json()["message"]
    answer = client.post("/v1/rerank", json={"query": "3,7,20,24>1:", "documents": []})
    assert answer.json()["message"].endswith("or objects with a text")


@pytest.mark.parametrize("path", ["/v1/best-of-n", "/v1/rerank", "/v1/score"])
def test_an_unknown_model_is_named(client, path):
    answer = client.post(path, json=PATHS[path] | {"model": "other"})
    assert "this server has 'tiny' only; got 'other'" in check(answer, 404)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = """
prompt candidates n query documents text_1 text_2 stop answers vote seed top_p temperature max_new_tokens top_k truncate
top_n aggregation stream deadline model
"""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["/v1/best-of-n", "/v1/rerank", "/v1/score"]),
    st.dictionaries(st.sampled_from(FIELDS.split()), VALUES, max_size=3),
)
def test_no_body_makes_the_server_fail(client, path, changes):
    body = json.dumps(PATHS[path] | changes)
    answer = client.post(path, content=body.encode(), headers=JSON)
    assert answer.status_code < 500, (body, answer.text)
    if answer.status_code >= 400:
        check(answer, 400, 404, 422)


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_pages_for_people_need_no_internet(client, path):
    """Every file that they name is one of this server's."""
    page = client.get(path)
    assert page.status_code == 200
    files = [part.split('"')[0] for word in ('src="', 'href="') for part in page.text.split(word)[1:]]
    assert files
    for file in files:
        assert file.startswith("/docs/files/"), file
        assert client.get(file).status_code == 200
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_the_document_lists_the_endpoints_alone(client):
    document = client.get("/openapi.json").json()
    assert "files" not in str([*document["paths"]])
    places = ("/v1", "/v2", "/health", "/metrics", "/predict", "/info")
    assert np.all([path.startswith(places) for path in document["paths"]])

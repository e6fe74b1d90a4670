"""Tensors that clients of the Open Inference Protocol fill themselves: no shape passes that does not fit."""

import json
import math

import httpx
import numpy as np
import pytest

from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.serve import Settings
from bonnx.runtime.serve.tensors import _BROADCAST, MOST_STOPS
from tests.runtime.serve.servers import served

KINDS = {"int64": "INT64", "float32": "FP32"}


@pytest.fixture(scope="module")
def engine(tiny):
    return open_engine(tiny)


@pytest.fixture(scope="module")
def client(engine):
    with served(engine, Settings(max_tokens=64)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def good(graph):
    """Feeds of a graph that fit."""
    one, ids = np.ones((1, 1, 1), np.int64), {"answer_ids": np.full((1, 1), -1), "vote": np.array(0)}
    if graph == "rank":
        feeds = {"prompt_ids": np.ones((2, 3)), "candidate_ids": np.ones((4, 2, 5)), "step_mask": one, **ids}
        feeds |= {"prompt_mask": np.ones((2, 3)), "candidate_mask": np.ones((4, 2, 5)), "aggregation": np.array(0)}
    elif graph == "score":
        feeds = {"input_ids": np.ones((6, 5)), "attention_mask": np.ones((6, 5)), "step_mask": one, **ids}
        feeds |= {"num_candidates": np.array(3), "aggregation": np.array(0)}
    else:
        feeds = {"input_ids": np.ones((2, 3)), "attention_mask": np.ones((2, 3)), "stop_tokens": np.array([1])}
        whole = {"num_candidates": 2, "max_new_tokens": 4, "top_k": 0, "seed": 0, "aggregation": 0, "step_token": -1}
        feeds |= {name: np.array(value) for name, value in (whole | {"prune_every": 0}).items()}
        floats = {name: np.array(1, np.float32) for name in ("temperature", "top_p", "prune_keep")}
        return {name: array.astype(np.int64) for name, array in feeds.items()} | floats
    return {name: array.astype(np.int64) for name, array in feeds.items()}


def post(client, graph, feeds, *, binary=False, change=None):
    inputs, blobs = [], b""
    for name, array in feeds.items():
        tensor = {"name": name, "shape": [*array.shape], "datatype": KINDS[str(array.dtype)]}
        if binary:
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            blobs += array.tobytes()
        else:
            tensor["data"] = array.ravel().tolist()
        inputs.append(tensor)
    body = {"inputs": inputs}
    if change is not None:
        change(body)
    head = json.dumps(body).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))} if binary else {}
    return client.post(f"/v2/models/tiny_{graph}/infer", content=head + blobs, headers=headers)


def tensors_of(answer):
    assert answer.status_code == 200, answer.text
    return {output["name"]: np.reshape(output["data"], output["shape"]) for output in answer.json()["outputs"]}


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("graph", ["rank", "score", "generate"])
def test_every_axis_of_every_tensor_is_checked(client, engine, graph, binary):
    feeds = good(graph)
    assert post(client, graph, feeds, binary=binary).status_code == 200
    for value in engine.manifest.graphs[graph].inputs:
        for place, axis in enumerate(value.shape):
            if axis == "stops":
                continue
            shape = [*feeds[value.name].shape]
            shape[place] += 6
            answer = post(client, graph, feeds | {value.name: np.ones(shape, np.int64)}, binary=binary)
            assert answer.status_code == 400, (value.name, axis)
            assert "expected" in answer.json()["error"]
            assert "cannot run" not in answer.json()["error"]
            shape[place] = 0
            answer = post(client, graph, feeds | {value.name: np.ones(shape, np.int64)}, binary=binary)
            assert "expected at least one element" in answer.json()["error"]


def test_options_for_each_prompt(client, engine):
    """Two prompts that differ in every option: each as in a run of its own."""
    names = [*engine.manifest.graphs["generate"].per_prompt]
    metadata = client.get("/v2/models/tiny_generate").json()
    assert {value["name"] for value in metadata["inputs"] if value["shape"] == [-1]} == {*names, "stop_tokens"}
    options = {"num_candidates": [3, 1], "max_new_tokens": [2, 6], "temperature": [0.5, 1.5], "top_k": [9, 0]}
    options |= {"top_p": [1.0, 0.7], "seed": [2**62 + 3, -8], "aggregation": [4, 1], "step_token": [-1, 3]}
    options |= {"prune_every": [1, 0], "prune_keep": [0.4, 0.6]}
    assert {*options} == {*names}
    feeds = good("generate")
    each = {name: np.array(values, feeds[name].dtype) for name, values in options.items()}
    stops = np.array([7, (2 << 32) + 5, *((1 << 32) + token for token in range(40, 90))])
    outputs = tensors_of(post(client, "generate", feeds | each | {"stop_tokens": stops}))
    for b in range(2):
        own = [token & 0xFFFFFFFF for token in stops.tolist() if token >> 32 in (0, b + 1)]
        alone = {name: values[b] for name, values in each.items()} | {"stop_tokens": np.array(own)}
        alone |= {name: feeds[name][b : b + 1] for name in ("input_ids", "attention_mask")}
        expected = tensors_of(post(client, "generate", feeds | alone))
        count, _, length = expected["sequences"].shape
        assert count == options["num_candidates"][b]
        assert np.array_equal(outputs["sequences"][:count, b, :length], expected["sequences"][:, 0])
        assert np.array_equal(outputs["lengths"][:count, b], expected["lengths"][:, 0])
        assert np.array_equal(outputs["finish_reasons"][:count, b], expected["finish_reasons"][:, 0])
        assert outputs["best_index"][b] == expected["best_index"][0]
    assert outputs["finish_reasons"][:, 1].tolist()[1:] == [-1, -1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": np.array([1, 2, 3])}, "seed: its axis 'batch' is 3, that of input_ids 2; expected equal"),
        ({"top_k": np.ones((2, 1), np.int64)}, "'top_k': expected the shape [] or [batch]; got [2, 1]"),
        ({"top_k": np.ones(0, np.int64)}, "top_k: expected at least one element"),
        ({"temperature": np.array([1, -1], np.float32)}, "temperature: expected 0 to 1e+30; got -1.0"),
        ({"num_candidates": np.array([4, 5000])}, "5000 candidates"),
        ({"max_new_tokens": np.array([60, 1])}, "this server takes at most 64 at once"),
        ({"stop_tokens": np.array([5, (3 << 32) + 5])}, "the upper 32 bits name prompt 3, counted from 1; there are 2"),
    ],
    ids=["length", "rank", "empty", "range", "candidates", "tokens", "stop token"],
)
def test_options_for_each_prompt_that_do_not_fit(client, wrong, message):
    answer = post(client, "generate", good("generate") | wrong)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize("graph", _BROADCAST)
def test_one_value_stands_for_a_whole_axis(client, graph):
    sizes = {"num_candidates": 4, "batch": 2, "length": 5} if graph == "rank" else {"sequence": 5}
    shape = [sizes[other] for axis, other in _BROADCAST[graph].items() if axis.startswith("step")]
    shape = [1] * (3 - len(shape)) + shape
    assert post(client, graph, good(graph) | {"step_mask": np.ones(shape, np.int64)}).status_code == 200


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("long", "short"), [("input_ids", "attention_mask"), ("attention_mask", "input_ids")])
def test_a_long_tensor_beside_a_short_one(client, long, short, binary):
    """Whichever tensor is read for the size, the other one may be the long one."""
    feeds = good("score") | {"num_candidates": np.array(1), long: np.ones((1, 100_000), np.int64)}
    answer = post(client, "score", feeds | {short: np.ones((1, 1), np.int64)}, binary=binary)
    assert answer.status_code == 400
    assert "its axis 'sequence'" in answer.json()["error"]


@pytest.mark.parametrize("binary", [True, False])
def test_tensors_beyond_the_limits_are_refused(client, binary):
    whole = {name: np.ones((1, 100_000), np.int64) for name in ("input_ids", "attention_mask")}
    answer = post(client, "score", good("score") | {"num_candidates": np.array(1)} | whole, binary=binary)
    assert "100000 tokens in a row: this model takes at most 8192" in answer.json()["error"]
    many = {name: np.ones((5000, 1, 1), np.int64) for name in ("candidate_ids", "candidate_mask")}
    prompt = {name: np.ones((1, 3), np.int64) for name in ("prompt_ids", "prompt_mask")}
    answer = post(client, "rank", good("rank") | prompt | many, binary=binary)
    assert "5000 candidates: this model takes at most 4096" in answer.json()["error"]
    stops = np.ones(MOST_STOPS + 1, np.int64)
    answer = post(client, "generate", good("generate") | {"stop_tokens": stops}, binary=binary)
    assert "stop_tokens: 1025 are too many" in answer.json()["error"]
    whole = {name: np.ones((13, 5), np.int64) for name in ("input_ids", "attention_mask")}
    answer = post(client, "score", good("score") | {"num_candidates": np.array(13)} | whole, binary=binary)
    assert "this server takes at most 64 at once" in answer.json()["error"]


def named(body, name):
    return next(tensor for tensor in body["inputs"] if tensor["name"] == name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: named(body, "input_ids").update(shape=[-1, 5]), ">= 0"),
        (lambda body: named(body, "input_ids").update(shape=[2**62, 2**62]), "2147483647"),
        (lambda body: named(body, "input_ids").update(shape=[2**30, 2**30]), "axis 'rows' is 6"),
        (lambda body: named(body, "input_ids").update(shape=[30]), "expected the shape"),
        (lambda body: named(body, "input_ids").update(shape=[1] * 100_000), "expected the shape"),
        (lambda body: named(body, "vote").update(shape=[1, 1]), "expected the shape []"),
        (lambda body: named(body, "input_ids").update(data=[1] * 29), "not INT64 values of the shape [6, 5]"),
        (lambda body: named(body, "input_ids").update(data=[[1] * 5] * 7), "not INT64 values of the shape [6, 5]"),
        (lambda body: named(body, "input_ids").update(data=[1.0] * 30), "expected whole numbers"),
        (lambda body: named(body, "input_ids").update(data=[True] * 30), "expected whole numbers"),
        (lambda body: named(body, "input_ids").update(data=[2**63] * 30), "not INT64 values"),
        (lambda body: named(body, "input_ids").update(data=None), "expected whole numbers"),
        (lambda body: named(body, "input_ids").update(datatype="FP32"), "expected datatype INT64; got FP32"),
        (lambda body: named(body, "input_ids").update(datatype="BYTES"), "expected datatype INT64; got BYTES"),
        (lambda body: named(body, "input_ids").update(name="ids"), "'ids' is not wanted"),
        (lambda body: body["inputs"].append(body["inputs"][0]), "'input_ids' appears twice"),
        (lambda body: body["inputs"].pop(0), "input_ids not given"),
        (lambda body: named(body, "input_ids").update(dtype="INT64"), "unknown field `dtype`"),
        (lambda body: body.update(priority=1), "unknown field `priority`"),
        (lambda body: body.update({"\ud800": 1}), "surrogates not allowed"),
        (lambda body: body["inputs"].append("\ud800"), "Open Inference Protocol"),
        (lambda body: named(body, "input_ids").update(name="\ud800"), "is not wanted"),
        (lambda body: named(body, "input_ids").update(data=["\ud800"] * 30), "expected whole numbers"),
        (lambda body: body.update(outputs=[{"name": "logits"}]), "there is no 'logits'"),
        (lambda body: body.update(outputs=[{"name": "scores"}] * 2), "a name appears twice"),
        (lambda body: named(body, "attention_mask").update(data=[1] * 29 + [7]), "expected 0 or 1 everywhere; got 7"),
        (lambda body: named(body, "step_mask").update(data=[-1]), "expected 0 or 1 everywhere; got -1"),
        (lambda body: named(body, "answer_ids").update(shape=[6, 1], data=[0] * 6), "expected 3 candidates and 2"),
        (lambda body: named(body, "num_candidates").update(data=[0]), "num_candidates: expected 1 to"),
        (lambda body: named(body, "num_candidates").update(data=[4]), "4 do not divide 6 rows"),
        (lambda body: named(body, "input_ids").update(parameters={"binary_data_size": 240}), "got both"),
    ],
)
def test_what_does_not_fit_is_named(client, change, message):
    answer = post(client, "score", good("score"), change=change)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize(("sent", "returned"), [("a", "a"), ("é", "é"), ("\ud800", "\ufffd")], ids=ascii)
def test_an_id_comes_back(client, sent, returned):
    answer = post(client, "score", good("score"), change=lambda body: body.update(id=sent))
    assert (answer.status_code, answer.json()["id"]) == (200, returned)


@pytest.mark.parametrize("size", [0, 8, 2**40])
def test_bytes_are_counted(client, size):
    change = lambda body: named(body, "input_ids")["parameters"].update(binary_data_size=size)  # noqa: E731
    answer = post(client, "score", good("score"), binary=True, change=change)
    assert answer.status_code == 400
    assert "30 values are 240 bytes" in answer.json()["error"]


def test_a_header_longer_than_the_body_is_refused(client):
    answer = client.post("/v2/models/tiny_score/infer", content=b"{}", headers={"Inference-Header-Content-Length": "3"})
    assert "expected at most the body's 2 bytes" in answer.json()["error"]


@pytest.mark.parametrize("value", [1e300, -1e39, math.nan])
def test_numbers_that_float32_does_not_hold(client, value):
    change = lambda body: named(body, "temperature").update(data=[value])  # noqa: E731
    answer = post(client, "generate", good("generate"), change=change)
    assert answer.status_code == 400
    assert "warn" not in answer.text

"""The server, over real HTTP, with the clients that people have."""

import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from cohere import Client, ClientV2
from tritonclient import http as triton

import bonnx
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.rank.request import read_request
from bonnx.runtime.serve import Settings, service
from tests.runtime.serve.servers import Process, served
from tests.tolerance import RUNTIME, within

PUZZLE = "3,7,20,24>1:"
NAME = "countdown"


@pytest.fixture
def tritons(url):
    client = triton.InferenceServerClient(url.removeprefix("http://"))
    yield client
    client.close()


def draw_candidates(rng, count):
    return ["".join(f"{a}+{b}={c};" for a, b, c in rng.integers(1, 60, (rng.integers(1, 4), 3))) for _ in range(count)]


# ---- the clients that people have


@pytest.mark.parametrize("kind", [Client, ClientV2])
def test_coheres_client_reranks(url, model, rng, kind):
    documents = draw_candidates(rng, 6)
    expected = model.rank(PUZZLE, documents)
    with httpx.Client() as http:
        client = kind("key", base_url=url, httpx_client=http)
        reranked = client.rerank(model=NAME, query=PUZZLE, documents=documents, top_n=4)
    assert [result.index for result in reranked.results] == list(expected.order[:4])
    scores = expected.candidate_scores[list(expected.order[:4])]
    assert within([result.relevance_score for result in reranked.results], scores, RUNTIME)


def infer(client, graph, feeds, outputs=None, *, binary=True):
    inputs = []
    for name, array in feeds.items():
        kind = {"int64": "INT64", "float32": "FP32"}[str(array.dtype)]
        tensor = triton.InferInput(name, [*array.shape], kind)
        tensor.set_data_from_numpy(array, binary_data=binary)
        inputs.append(tensor)
    wanted = outputs and [triton.InferRequestedOutput(name, binary_data=binary) for name in outputs]
    return client.infer(f"{NAME}_{graph}", inputs, outputs=wanted)


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_runs_the_graphs(tritons, model, rng, binary):
    client = tritons
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(f"{NAME}_rank")
    assert client.get_server_metadata()["name"] == "bonnx"
    described = client.get_model_metadata(f"{NAME}_rank")
    graph = model.manifest.graphs["rank"]
    assert [tensor["name"] for tensor in described["inputs"]] == [value.name for value in graph.inputs]
    prompts = rng.integers(1, 99, (2, 7))
    candidates = rng.integers(1, 99, (3, 2, 9))
    feeds = {
        "prompt_ids": prompts,
        "prompt_mask": np.ones_like(prompts),
        "candidate_ids": candidates,
        "candidate_mask": np.ones_like(candidates),
        "step_mask": np.ones((1, 1, 1), np.int64),
        "aggregation": np.array([1]),
        "answer_ids": np.full((1, 1), -1),
        "vote": np.array([0]),
    }
    outputs = infer(client, "rank", feeds, ["candidate_scores", "best_index"], binary=binary)
    for b in range(2):
        expected = model.rank(prompts[b], list(candidates[:, b]), aggregation="mean")
        assert within(outputs.as_numpy("candidate_scores")[:, b], expected.candidate_scores, RUNTIME)
        assert outputs.as_numpy("best_index")[b] == expected.best_index
    assert outputs.as_numpy("scores") is None


def test_tritons_client_generates_and_scores(tritons, engine, model, rng):
    client = tritons
    ids = np.array([engine.reader.prompt(PUZZLE)])
    whole = {"num_candidates": 3, "max_new_tokens": 20, "top_k": 0, "seed": 5, "aggregation": 0}
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "stop_tokens": np.array([model.manifest.scoring.end_token]),
        **{name: np.array([value]) for name, value in (whole | {"step_token": -1, "prune_every": 0}).items()},
        **{name: np.array([1], np.float32) for name in ("temperature", "top_p", "prune_keep")},
    }
    outputs = infer(client, "generate", feeds)
    expected = model.generate(PUZZLE, n=3, max_new_tokens=20, seed=5)
    assert outputs.as_numpy("best_index")[0] == expected.best_index
    own = expected.candidates[1].tokens
    assert outputs.as_numpy("sequences")[1, 0, : len(own)].tolist() == own.tolist()
    rows = rng.integers(1, 99, (4, 6))
    selection = {"aggregation": np.array([0]), "vote": np.array([0]), "num_candidates": np.array([4])}
    selection |= {"step_mask": np.ones((1, 1, 1), np.int64), "answer_ids": np.full((1, 1), -1)}
    scored = infer(client, "score", {"input_ids": rows, "attention_mask": np.ones_like(rows), **selection})
    expected = model.score(list(rows))
    assert within(scored.as_numpy("candidate_scores")[:, 0], expected.row_scores, RUNTIME)


PAIR = {
    "input_ids": np.array([[5], [6]]),
    "attention_mask": np.ones((2, 1), np.int64),
    "num_candidates": np.array([2]),
    "step_mask": np.ones((1, 1, 1), np.int64),
    "aggregation": np.array([0]),
    "answer_ids": np.full((1, 1), -1),
    "vote": np.array([0]),
}


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"input_ids": np.array([[5000], [6]])}, "outside the vocabulary"),
        ({"num_candidates": np.array([3])}, "do not divide"),
        ({"input_ids": np.array([[5], [6], [7]])}, "its axis 'rows' is 2, that of input_ids 3"),
        ({"aggregation": np.array([9])}, "aggregation: expected 0 to 4"),
        ({"vote": np.array([1, 2])}, "expected the shape"),
        ({"vote": np.array([1], np.float32)}, "expected datatype INT64"),
        ({"mask": np.array([1])}, "'mask' is not wanted"),
    ],
    ids=["vocabulary", "rows that do not divide", "axes", "aggregation", "shape", "datatype", "unknown input"],
)
def test_tritons_client_is_told_what_is_wrong(tritons, feeds, message):
    with pytest.raises(triton.InferenceServerException, match=message) as e:
        infer(tritons, "score", PAIR | feeds)
    assert "/" not in str(e.value.message())


def test_tritons_client_is_told_that_there_is_no_such_model(tritons):
    with pytest.raises(triton.InferenceServerException, match="no model 'other'"):
        tritons.get_model_metadata("other")


# ---- the project's own endpoints


def test_score_takes_one_text_against_many_and_pairs(client, model, rng):
    texts = draw_candidates(rng, 4)
    prompts = [PUZZLE, "13,14,2,6>26:", PUZZLE, "5,6,7>42:"]
    one = client.post("/v1/score", json={"model": NAME, "text_1": PUZZLE, "text_2": texts}).json()
    expected = model.rank(PUZZLE, texts).candidate_scores
    assert within([entry["score"] for entry in one["data"]], expected, RUNTIME)
    pairs = client.post("/v1/score", json={"text_1": prompts, "text_2": texts, "aggregation": "min"}).json()
    expected = [
        model.rank(prompt, [text], aggregation="min").candidate_scores[0]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    assert within([entry["score"] for entry in pairs["data"]], expected, RUNTIME)
    assert [entry["index"] for entry in pairs["data"]] == [0, 1, 2, 3]


def test_best_of_given_candidates(client, engine, model, rng):
    candidates = draw_candidates(rng, 5)
    answers = ["a", "b", "a", None, "b"]
    body = {"prompt": PUZZLE, "candidates": candidates, "answers": answers, "vote": "weighted", "token_scores": True}
    answer = client.post("/v1/best-of-n", json=body).json()
    expected = model.rank(PUZZLE, candidates, answers=answers, vote="weighted")
    assert (answer["best_index"], answer["best"]) == (expected.best_index, expected.best)
    assert answer["order"] == list(expected.order)
    assert within(answer["margin"], expected.margin, RUNTIME)
    for entry, scores, score in zip(answer["candidates"], expected.scores, expected.candidate_scores, strict=True):
        assert within(entry["token_scores"], scores, RUNTIME)
        assert within(entry["score"], score, RUNTIME)
    assert answer["candidates"][3]["group_score"] is None
    ids = [engine.reader.prompt(PUZZLE).tolist(), [[5, 6], [7]]]
    answer = client.post("/v1/best-of-n", json={"prompt": ids[0], "candidates": ids[1]}).json()
    assert answer["best_index"] == model.rank(*ids).best_index


@pytest.mark.parametrize("more", [{}, {"deadline": 30}], ids=["in one run", "until a deadline"])
def test_best_of_n_generated(client, model, more):
    body = {"prompt": PUZZLE, "n": 6, "seed": 11, "temperature": 1.2}
    expected = model.generate(PUZZLE, n=6, seed=11, temperature=1.2)
    answer = client.post("/v1/best-of-n", json=body | more).json()
    assert answer["best"] == expected.best.text
    assert [c["text"] for c in answer["candidates"]] == [c.text for c in expected.candidates]
    usage = {"prompt_tokens": 10, "completion_tokens": expected.computed_tokens, "cut_tokens": 0}
    assert answer["usage"] == usage | {"total_tokens": 10 + expected.computed_tokens}


def test_generation_is_watched(client, model):
    body = {"prompt": PUZZLE, "n": 3, "seed": 4, "stream": True}
    events = []
    with client.stream("POST", "/v1/best-of-n", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            kind, _, value = line.partition(": ")
            if kind == "event":
                events.append((value, None))
            elif kind == "data":
                events[-1] = (events[-1][0], json.loads(value))
    expected = model.generate(PUZZLE, n=3, seed=4)
    names = [name for name, _ in events]
    assert names[-1] == "result"
    assert set(names[:-1]) == {"progress"}
    assert events[-1][1]["best"] == expected.best.text
    assert len({state["id"] for _, state in events}) == 1
    for _, state in events:
        for entry, candidate in zip(state["candidates"], expected.candidates, strict=True):
            assert candidate.text.startswith(entry["text"])


def test_embeddings(small, rng):
    engine = open_engine(small)
    model = bonnx.Model(engine)
    prompt, candidates = rng.standard_normal((4, 12)), rng.standard_normal((3, 5, 12))
    body = {"prompt": prompt.tolist(), "candidates": candidates.tolist(), "aggregation": "mean"}
    expected = model.rank(prompt.astype(np.float32), list(candidates.astype(np.float32)), aggregation="mean")
    with served(engine) as url:
        answer = httpx.post(f"{url}/v1/best-of-n", json=body, timeout=60).json()
        assert within([entry["score"] for entry in answer["candidates"]], expected.candidate_scores, RUNTIME)
        refused = httpx.post(f"{url}/v1/best-of-n", json={"prompt": prompt.tolist(), "n": 2}, timeout=60)
        assert refused.status_code == 400
        assert "no language model" in refused.json()["message"]
        ragged = httpx.post(f"{url}/v1/best-of-n", json=body | {"prompt": [[1.0], [1.0, 2.0]]}, timeout=60)
        assert "rows of one length" in ragged.json()["message"]


def test_many_at_once_get_what_each_gets_alone(url, model, rng):
    prompts = [PUZZLE, "13,14,2,6>26:", "5,6,7>42:", "3,7,12,25>98:"]
    bodies = []
    for i in range(200):
        prompt = prompts[rng.integers(4)]
        if i % 10:
            bodies.append({"prompt": prompt, "candidates": draw_candidates(rng, int(rng.integers(1, 6)))})
        else:
            bodies.append({"prompt": prompt, "n": 3, "seed": int(rng.integers(3))})
    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(64) as pool:
        answers = [*pool.map(lambda body: client.post("/v1/best-of-n", json=body), bodies)]
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        if "n" in body:
            expected = model.generate(body["prompt"], n=3, seed=body["seed"])
            assert [c["text"] for c in found["candidates"]] == [c.text for c in expected.candidates]
        else:
            expected = model.rank(body["prompt"], body["candidates"])
            assert within([c["score"] for c in found["candidates"]], expected.candidate_scores, RUNTIME)
    metrics = httpx.get(f"{url}/metrics", timeout=60).text
    runs = float(
        next(
            line for line in metrics.splitlines() if line.startswith('bonnx_run_requests_count{batcher="rank"}')
        ).split()[1]
    )
    assert runs < 180


@pytest.mark.parametrize("whole", [True, False])
def test_generations_of_all_kinds_run_together(engine, model, rng, whole, monkeypatch):
    # Whole runs for a model as small as this one, and else joined at any token.
    monkeypatch.setattr(service, "is_brief", lambda *_: whole)
    bodies = []
    for _ in range(24):
        body = {"prompt": str(rng.choice([PUZZLE, "13,14,2,6>26:", "5,6,7>42:"])), "n": int(rng.integers(1, 6))}
        body |= {"seed": int(rng.integers(2**53)), "temperature": float(rng.choice([0, 0.7, 1.3]))}
        body |= {"top_k": int(rng.choice([0, 5])), "top_p": float(rng.choice([1, 0.8]))}
        body |= {"max_new_tokens": int(rng.integers(5, 30)), "aggregation": str(rng.choice(["last", "step_min"]))}
        bodies.append(body | ({"stop": [[";"], ["="], []][rng.integers(3)]} if rng.random() < 0.5 else {}))
    with served(engine, Settings(batch_wait=0.5)) as url, ThreadPoolExecutor(24) as pool:
        answers = [*pool.map(lambda body: httpx.post(f"{url}/v1/best-of-n", json=body, timeout=60), bodies)]
        metrics = httpx.get(f"{url}/metrics", timeout=60).text
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200, answer.text
        expected = model.generate(**body)
        assert [c["text"] for c in answer.json()["candidates"]] == [c.text for c in expected.candidates]
        assert within(
            [c["score"] for c in answer.json()["candidates"]], [c.score for c in expected.candidates], RUNTIME
        )
    requests, runs = (
        float(re.findall(rf'^bonnx_run_requests_{what}{{batcher="{batcher}"}} (\S+)$', metrics, re.MULTILINE)[0])
        for batcher in ["generate" if whole else "decode"]
        for what in ("sum", "count")
    )
    assert requests > 2 * runs


# ---- the command


def test_the_command_serves_logs_and_stops(countdown, tmp_path, monkeypatch):
    monkeypatch.setenv("BONNX_API_KEY", "k")
    with Process(countdown, cwd=tmp_path) as server:
        headers = {"Authorization": "Bearer k", "X-Request-ID": "my-number"}
        answer = httpx.post(f"{server.url}/v1/best-of-n", json={"prompt": PUZZLE, "n": 2}, headers=headers, timeout=60)
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == "my-number"
        document = httpx.get(f"{server.url}/openapi.json", headers=headers, timeout=60).json()
        assert {"/v1/rerank", "/v1/score", "/v1/best-of-n", "/v2/models/{model}/infer"} <= set(document["paths"])
        # What was taken before the signal is finished after it.
        with ThreadPoolExecutor(8) as pool:
            body = {"prompt": PUZZLE, "n": 64}
            post = lambda: httpx.post(f"{server.url}/v1/best-of-n", json=body, headers=headers, timeout=60)  # noqa: E731
            futures = [pool.submit(post) for _ in range(8)]
            until = time.monotonic() + 20
            while sum("candidates" in line for line in server.lines) < 2:
                assert time.monotonic() < until
            assert server.stop(signal.SIGTERM) == 0
            assert all(future.result().status_code == 200 for future in futures)
    line = next(line for line in server.lines if line.get("request_id") == "my-number")
    assert (line["event"], line["status"], line["path"], line["tokens"]) == ("request", 200, "/v1/best-of-n", 10)
    assert "prompt" not in line


def test_requests_with_other_options_do_not_run_together(engine):
    request = read_request(engine, PUZZLE, ["1+1=2;"])
    assert request.key == read_request(engine, "5,6,7>42:", ["1+1=2;"]).key
    assert request.key != read_request(engine, PUZZLE, ["1+1=2;"], aggregation="mean").key

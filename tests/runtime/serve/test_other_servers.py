"""Endpoints of vLLM, Text Embeddings Inference and Jina, as their clients send them and read the answers."""

import base64

import huggingface_hub
import numpy as np
import pytest

import bonnx
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.serve import Settings, create_app
from bonnx.runtime.serve.text_embeddings import tei_score
from tests.runtime.serve.texts import CHAT
from tests.tolerance import RUNTIME, within

TEXTS = ["which", "of", "them"]


@pytest.fixture(scope="module")
def engine(letters_engine):
    return letters_engine


@pytest.fixture(scope="module")
def model(engine):
    return bonnx.Model(engine)


def sigmoid(values):
    return 1 / (1 + np.exp(-np.asarray(values, np.float64)))


# ---- vLLM


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
def test_classify(client, model, path):
    answer = client.post(path, json={"model": "tiny", "input": TEXTS, "user": "me"}).json()
    scored = model.score(TEXTS)
    assert within([entry["probs"][0] for entry in answer["data"]], scored.row_scores, RUNTIME)
    assert [(entry["index"], entry["label"], entry["num_classes"]) for entry in answer["data"]] == [
        (i, "LABEL_0", 1) for i in range(3)
    ]
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    assert answer["usage"]["prompt_tokens"] == sum(map(len, scored.scores))
    alone = client.post(path, json={"input": TEXTS[0]}).json()["data"]
    assert within([alone[0]["probs"][0]], scored.row_scores[:1], RUNTIME)


def test_a_conversation_is_classified(client, model):
    conversation = [*CHAT, {"role": "assistant", "content": "one"}]
    (entry,) = client.post("/classify", json={"messages": conversation}).json()["data"]
    assert within(entry["probs"], model.score([conversation]).row_scores, RUNTIME)


@pytest.mark.parametrize("ids", [[1, 2, 3], [[1, 2, 3], [4, 5]]], ids=["one", "several"])
def test_token_ids_are_classified(client, model, ids):
    rows = ids if isinstance(ids[0], list) else [ids]
    data = client.post("/classify", json={"input": ids}).json()["data"]
    assert within([entry["probs"][0] for entry in data], model.score(rows).row_scores, RUNTIME)


def test_pooling(client, model):
    """A sequence's reward is one number, as for vLLM's reward models; `token_classify` gives one for each token."""
    scored = model.score(TEXTS)
    whole = client.post("/pooling", json={"model": "tiny", "input": TEXTS}).json()
    assert [entry["object"] for entry in whole["data"]] == ["pooling"] * 3
    assert within([entry["data"][0] for entry in whole["data"]], scored.row_scores, RUNTIME)
    tokens = client.post("/pooling", json={"input": TEXTS, "task": "token_classify"}).json()["data"]
    for entry, scores in zip(tokens, scored.scores, strict=True):
        assert np.shape(entry["data"]) == (len(scores), 1)
        assert within(np.ravel(entry["data"]), scores, RUNTIME)
    body = {"input": TEXTS, "task": "token_classify", "encoding_format": "base64"}
    packed = client.post("/pooling", json=body).json()["data"]
    for entry, scores in zip(packed, scored.scores, strict=True):
        assert within(np.frombuffer(base64.b64decode(entry["data"]), "<f4"), scores, RUNTIME)


def test_what_cannot_be_classified_is_null_and_named(post):
    answer = post("/classify", {"input": ["which", "", "a\ud800"]}).json()
    assert [entry["probs"][0] is None for entry in answer["data"]] == [False, True, True]
    assert [warning.split(":")[0] for warning in answer["warnings"]] == ["input[1]", "input[2]"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/classify", {}, "expected either input or messages; got neither"),
        ("/classify", {"input": "a", "messages": CHAT}, "got both"),
        ("/classify", {"input": []}, "input: expected a text, token ids"),
        ("/classify", {"input": "a", "truncate_prompt_tokens": 3}, "inputs are never cut"),
        ("/classify", {"input": "a", "use_activation": False}, "scores are always as the model gives them"),
        ("/classify", {"input": ""}, "input: it has no tokens"),
        ("/classify", {"input": ["a", "which of them " * 400]}, "input[1]: "),
        ("/classify", {"input": "a", "model": "other"}, "this server has 'tiny' only"),
        ("/pooling", {"input": "a", "task": "embed"}, "task: expected 'classify' or 'token_classify'"),
        ("/pooling", {"input": "a", "encoding_format": "bytes"}, "encoding_format: expected"),
        ("/pooling", {"data": {"x": 1}}, "unknown field 'data'"),
        ("/predict", {}, "inputs: "),
        ("/predict", {"inputs": ["a", "b", "c"]}, "inputs: expected a text, a pair of texts"),
        ("/predict", {"inputs": [["a"], [""]]}, "inputs[1]: it has no tokens"),
        ("/predict", {"inputs": "a", "parameters": {"function_to_apply": "none"}}, "function_to_apply: send"),
        ("/predict", {"query": "a", "texts": ["b"]}, "query: send it to /rerank"),
        ("/rerank", {"query": "a"}, "expected documents, or as Text Embeddings Inference takes them texts"),
        ("/rerank", {"query": "a", "texts": ["b"], "top_n": 1}, "top_n: belongs to documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "return_text": True}, 'send "return_documents": true'),
        ("/rerank", {"query": "a", "texts": ["b"], "truncation_direction": "Right"}, "truncation_direction: expected"),
        ("/rerank", {"query": "a", "documents": ["b"], "max_doc_length": 9}, "documents are never cut"),
    ],
    ids=str,
)
def test_bodies_that_cannot_be(client, path, body, message):
    answer = client.post(path, json=body)
    assert answer.status_code == (404 if body.get("model") == "other" else 400)
    assert message in answer.json()["message"]


# ---- Text Embeddings Inference


def test_rerank_of_texts(client, model):
    """The order and the shape that LlamaIndex' and LangChain's clients read."""
    answer = client.post("/rerank", json={"query": "which", "texts": TEXTS}).json()
    ranking = model.rank("which", TEXTS)
    assert [entry["index"] for entry in answer] == list(ranking.order)
    assert within([entry["score"] for entry in answer], sigmoid(ranking.candidate_scores)[list(ranking.order)], RUNTIME)
    assert all(entry.keys() == {"index", "score"} for entry in answer)
    body = {"query": "which", "texts": TEXTS, "raw_scores": True, "return_text": True, "truncate": True}
    raw = client.post("/rerank", json=body | {"truncation_direction": "Left"}).json()
    assert within([entry["score"] for entry in raw], ranking.candidate_scores[list(ranking.order)], RUNTIME)
    assert [entry["text"] for entry in raw] == [TEXTS[i] for i in ranking.order]


def test_predict(client, model):
    alone, pair = model.score(["which"]).row_scores[0], model.rank("which", ["of"]).candidate_scores[0]
    (one,) = client.post("/predict", json={"inputs": "which"}).json()
    assert one["label"] == "LABEL_0"
    assert within([one["score"]], sigmoid([alone]), RUNTIME)
    (two,) = client.post("/predict", json={"inputs": ["which", "of"], "raw_scores": True, "truncate": False}).json()
    assert within([two["score"]], [pair], RUNTIME)
    both = client.post("/predict", json={"inputs": [["which", "of"], ["which"]], "raw_scores": True}).json()
    assert within([entry["score"] for (entry,) in both], [pair, alone], RUNTIME)


def test_hugging_faces_client(url, model):
    """It sends a text to the address itself, and reads what `/info` and `/health` say."""
    client = huggingface_hub.InferenceClient(model=url)
    scored = client.text_classification("which", top_k=1)
    scored = scored[0] if isinstance(scored, list) else scored
    assert within([scored.score], sigmoid(model.score(["which"]).row_scores), RUNTIME)
    client = huggingface_hub.InferenceClient(model=url, provider="hf-inference")
    info = client.get_endpoint_info()
    assert (info["model_id"], info["max_input_length"]) == ("tiny", 60)
    assert info["model_type"]["reranker"]["id2label"] == {"0": "LABEL_0"}
    assert client.health_check()


# ---- Jina


def test_jinas_clients_read_the_answer_and_the_error(client, model):
    body = {"model": "tiny", "query": "which", "documents": [*TEXTS[:2], {"text": TEXTS[2]}], "top_n": 2}
    answer = client.post("/v1/rerank", json=body | {"return_documents": True}).json()
    ranking = model.rank("which", TEXTS)
    assert [entry["index"] for entry in answer["results"]] == list(ranking.order[:2])
    assert [entry["document"]["text"] for entry in answer["results"]] == [TEXTS[i] for i in ranking.order[:2]]
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 0
    refused = client.post("/v1/rerank", json=body | {"model": "jina-reranker-v3"})
    assert "results" not in refused.json()
    assert "this server has 'tiny' only" in refused.json()["detail"]


def test_scores_that_are_probabilities_stay_so(countdown):
    service = create_app(open_engine(countdown), Settings()).state.service
    assert tei_score(service, 0.25, raw=False) == 0.25
    with pytest.raises(bonnx.InputError, match="raw_scores: this model's scores are probabilities"):
        tei_score(service, 0.25, raw=True)

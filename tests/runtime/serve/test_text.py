"""Texts and messages over HTTP: what cannot be read, what clients of other servers send, and where text is read."""

import threading

import httpx
import pytest
from cohere import ClientV2

from bonnx.runtime.serve import Settings
from bonnx.runtime.text.chat import ChatTemplate
from bonnx.runtime.text.tokenizer import Tokenizer
from tests.runtime.serve.servers import served
from tests.runtime.serve.texts import CHAT, draw
from tests.tolerance import RUNTIME, within


@pytest.fixture(scope="module")
def engine(letters_engine):
    return letters_engine


# ---- candidates that cannot be read

BAD = {"": "it has no tokens", "x=y": "the vocabulary has no token for '='", "a\ud800": "half of a surrogate pair"}


def holes(rng):
    """Texts among which some cannot be read, and where those are."""
    texts = [*(draw(rng) for _ in range(3)), *BAD]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    return texts, [i for i, text in enumerate(texts) if text in BAD]


def check_warnings(warnings, name, texts, bad):
    assert len(warnings) == len(bad)
    for warning, i in zip(warnings, bad, strict=True):
        assert warning.startswith(f"{name}[{i}]: ")
        assert BAD[texts[i]] in warning


def test_coheres_client_gets_numbers_and_warnings(url, model, rng):
    texts, bad = holes(rng)
    good = [i for i in range(len(texts)) if i not in bad]
    expected = model.rank("which", [texts[i] for i in good]).candidate_scores
    with httpx.Client() as http:
        client = ClientV2("key", base_url=url, httpx_client=http)
        # Half of a surrogate pair is nothing that this client can send.
        texts = ["" if text == "a\ud800" else text for text in texts]
        reranked = client.rerank(model="tiny", query="which", documents=texts)
    scores = {result.index: result.relevance_score for result in reranked.results}
    assert sorted(scores) == good
    assert within([scores[i] for i in good], expected, RUNTIME)
    check_warnings(reranked.meta.warnings, "documents", texts, bad)


def test_one_bad_candidate_has_null_and_cannot_win(post, rng):
    texts, bad = holes(rng)
    answer = post("/v1/best-of-n", {"prompt": "which", "candidates": texts, "token_scores": True}).json()
    assert [i for i, entry in enumerate(answer["candidates"]) if entry["score"] is None] == bad
    assert answer["best_index"] not in bad
    assert set(answer["order"][-len(bad) :]) == set(bad)
    assert [answer["candidates"][i]["token_scores"] for i in bad] == [[]] * len(bad)
    check_warnings(answer["warnings"], "candidates", texts, bad)
    answer = post("/v1/score", {"text_1": "which", "text_2": texts}).json()
    assert [i for i, entry in enumerate(answer["data"]) if entry["score"] is None] == bad
    check_warnings(answer["warnings"], "text_2", texts, bad)
    answer = post("/v1/rerank", {"query": "which", "documents": texts, "return_documents": True}).json()
    assert sorted(result["index"] for result in answer["results"]) == [i for i in range(len(texts)) if i not in bad]


def test_a_bad_pair_does_not_fail_the_others(post, rng):
    texts, bad = holes(rng)
    answer = post("/v1/score", {"text_1": ["which"] * len(texts), "text_2": texts}).json()
    alone = post("/v1/score", {"text_1": "which", "text_2": texts}).json()
    for entry, other in zip(answer["data"], alone["data"], strict=True):
        assert (entry["score"] is None) == (other["score"] is None)
        assert entry["score"] is None or within(entry["score"], other["score"], RUNTIME)
    check_warnings(answer["warnings"], "text_2", texts, bad)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/rerank", {"query": "which", "documents": ["", "x=y"]}, "documents: none can be read: documents[0]: it"),
        ("/v1/rerank", {"query": "x=y", "documents": ["a"]}, "query: the vocabulary has no token for '='"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query: "),
        ("/v1/rerank", {"query": "x\ud800", "documents": ["a", "b"]}, "query: expected Unicode text"),
        ("/v1/rerank", {"query": [{"role": "user"}], "documents": ["a"]}, "query[0]: there is no 'content'"),
        ("/v1/rerank", {"query": "which", "documents": ["a" * 500]}, "documents[0]: 500 characters are more than 60"),
        ("/v1/rerank", {"query": "which", "documents": ["c" * 70]}, "a query of 5 tokens and a document of 71"),
        (
            "/v1/rerank",
            {"query": "which", "documents": ["c" * 70], "truncate": True},
            "a document of 71 tokens: this artifact takes at most 60 together with the query, and a document is never",
        ),
        ("/v1/rerank", {"query": "which", "documents": ["a"] * 4097}, "4097 documents: this model takes at most 4096"),
        ("/v1/score", {"text_1": "which", "text_2": ""}, "text_2: it has no tokens"),
        ("/v1/score", {"text_1": "which", "text_2": [""]}, "text_2[0]: it has no tokens"),
        ("/v1/score", {"text_1": ["which", "x=y"], "text_2": ["a", "b"]}, "text_1[1]: the vocabulary has no token"),
        ("/v1/score", {"text_1": ["which"] * 2, "text_2": ["", "x=y"]}, "text_2[0]: it has no tokens"),
        ("/v1/score", {"text_1": ["c" * 400] * 2, "text_2": ["a", "b"]}, "text_1[0]: 400 characters are more than"),
        ("/v1/score", {"text_1": ["which"] * 2, "text_2": ["a", "c" * 400]}, "text_2[1]: 400 characters are more than"),
        ("/v1/best-of-n", {"prompt": "which", "candidates": ["", []]}, "candidates: none can be read: candidates[0]"),
        ("/v1/best-of-n", {"prompt": [{"role": "user"}], "n": 1}, "prompt[0]: there is no 'content'"),
        ("/v1/best-of-n", {"prompt": CHAT, "candidates": [[{"role": "a"}]]}, "candidates[0][0]: there is no 'content'"),
        ("/v1/best-of-n", {"prompt": "x\ud800", "n": 1}, "prompt: expected Unicode text"),
    ],
)
def test_errors_use_the_clients_words(post, path, body, message):
    answer = post(path, body)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["message"]


# ---- what clients of other servers send


@pytest.mark.parametrize(
    ("path", "more", "message"),
    [
        ("/v1/rerank", {"max_tokens_per_doc": 4096}, "max_tokens_per_doc: documents are never cut here"),
        ("/v1/rerank", {"max_chunks_per_doc": 10}, "max_chunks_per_doc: documents are never cut here"),
        ("/v1/rerank", {"truncate_prompt_tokens": 5}, 'truncate_prompt_tokens: send "truncate": true'),
        ("/v1/rerank", {"rank_fields": ["title"]}, "rank_fields: a document is ranked by its 'text' alone"),
        ("/v1/rerank", {"priority": 1}, "priority: requests run in the order"),
        (
            "/v1/rerank",
            {"texts": ["a"]},
            "expected documents, or as Text Embeddings Inference takes",
        ),
        ("/v1/rerank", {"raw_scores": True}, "raw_scores: scores are always as the model gives them"),
        ("/v1/rerank", {"return_text": True}, 'return_text: send "return_documents": true'),
        ("/v1/rerank", {"topn": 1}, "unknown field 'topn'; did you mean 'top_n'?"),
        ("/v1/rerank", {"\ud800": 1}, "a name in the body is no Unicode text"),
        ("/v1/score", {"truncate_prompt_tokens": -1}, 'truncate_prompt_tokens: send "truncate": true'),
        ("/v1/score", {"queries": "a"}, "queries: send them as 'text_1'"),
        ("/v1/best-of-n", {"messages": CHAT}, "messages: send them as 'prompt'"),
        ("/v1/best-of-n", {"max_tokens": 5}, "max_tokens: send it as 'max_new_tokens'"),
        ("/v1/best-of-n", {"stop": [0] * 1025}, "stop: expected"),
        ("/v1/best-of-n", {"stop": ""}, "stop: "),
        ("/v1/best-of-n", {"stop": 5}, "stop: expected"),
    ],
)
def test_fields_of_other_servers_are_refused_by_name(post, path, more, message):
    body = {
        "/v1/rerank": {"query": "which", "documents": ["a"]},
        "/v1/score": {"text_1": "which", "text_2": "a"},
        "/v1/best-of-n": {"prompt": "which", "n": 1},
    }[path]
    answer = post(path, body | more)
    assert answer.status_code == 400
    assert answer.json()["message"].startswith(message)
    # A client that sends all of its fields sends null for those that were not given.
    if next(iter(more)) not in ("topn", "\ud800"):
        assert post(path, body | dict.fromkeys(more)).status_code == 200


@pytest.mark.parametrize("stop", ["e", ["e"]], ids=["a text", "a list"])
def test_stop_is_a_text_or_a_list(post, model, stop):
    answer = post("/v1/best-of-n", {"prompt": "which", "n": 4, "max_new_tokens": 20, "seed": 1, "stop": stop}).json()
    expected = model.generate("which", n=4, max_new_tokens=20, seed=1, stop=["e"])
    assert [entry["text"] for entry in answer["candidates"]] == [c.text for c in expected.candidates]


def test_messages_as_candidates(post, model):
    candidates = [
        [{"role": "assistant", "content": "one"}],
        [{"role": "assistant", "tool_calls": [{"name": "look", "arguments": {}}]}, {"role": "tool", "content": "five"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]}],
    ]
    answer = post("/v1/best-of-n", {"prompt": CHAT, "candidates": candidates}).json()
    expected = model.rank(CHAT, candidates)
    assert within([entry["score"] for entry in answer["candidates"]], expected.candidate_scores, RUNTIME)
    assert answer["best"] == candidates[expected.best_index]


def test_documents_come_back_as_they_were_sent(post):
    documents = [{"text": "one", "title": "of a book", "year": 1}, "other"]
    answer = post("/v1/rerank", {"query": "which", "documents": documents, "return_documents": True}).json()
    assert {r["index"]: r["document"] for r in answer["results"]} == {0: documents[0], 1: {"text": "other"}}


# ---- where it is read


def test_no_long_text_is_read_where_others_wait(engine, monkeypatch):
    """Whatever makes a request long, its text is rendered and tokenized in a thread for that."""
    seen = []

    def watch(kind, name):
        own = getattr(kind, name)

        def watched(*arguments, **options):
            seen.append((name, threading.current_thread().name))
            return own(*arguments, **options)

        monkeypatch.setattr(kind, name, watched)

    for kind, name in ((Tokenizer, "encode"), (Tokenizer, "rows"), (ChatTemplate, "render"), (ChatTemplate, "split")):
        watch(kind, name)
    long = "which of them " * 400
    parts = [{"role": "user", "content": [{"type": "text", "text": long}]}]
    calls = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": long}]}]
    many = [{"role": "user", "content": "a"}] * 2000
    requests = [
        ("/v1/best-of-n", {"prompt": prompt, **more})
        for prompt in ([{"role": "user", "content": long}], parts, calls, many)
        for more in ({"candidates": ["a"]}, {"n": 1}, {"n": 1, "stream": True}, {"n": 1, "deadline": 5})
    ]
    requests += [
        ("/v1/best-of-n", {"prompt": "which", "n": 1, "stop": [long], "stream": True}),
        ("/v1/best-of-n", {"prompt": "which", "candidates": ["a"] * 2000, "answers": "number"}),
        # Short by itself, but the prompt is read once with each candidate.
        ("/v1/best-of-n", {"prompt": "which of them", "candidates": ["a"] * 350}),
        ("/v1/rerank", {"query": long, "documents": ["a"], "truncate": True}),
        ("/v1/rerank", {"query": "which of them", "documents": ["a"] * 350}),
        ("/v1/score", {"text_1": ["which of them"] * 150, "text_2": ["a"] * 150}),
        ("/v1/score", {"text_1": long, "text_2": ["a"], "truncate": True}),
    ]
    with served(engine) as url, httpx.Client(base_url=url, timeout=60) as client:
        for path, body in requests:
            seen.clear()
            assert client.post(path, json=body).status_code in (200, 400)
            assert seen, (path, str(body)[:80])
            assert {name for _, name in seen if not name.startswith("bonnx-read")} == set(), (path, str(body)[:80])


@pytest.mark.parametrize("prompt", [[{"role": "user", "content": "a" * 4000}], "a" * 4000], ids=["messages", "text"])
def test_text_that_is_read_again_with_each_candidate_is_bounded(engine, prompt):
    body = {"prompt": prompt, "candidates": ["a"] * 6, "truncate": True}
    with served(engine, Settings(max_body=5000)) as url:
        answer = httpx.post(f"{url}/v1/best-of-n", json=body, timeout=60)
        fewer = httpx.post(f"{url}/v1/best-of-n", json=body | {"candidates": ["a"] * 4}, timeout=60)
    assert answer.status_code == 400
    assert "this server reads at most 20000 at once" in answer.json()["message"]
    assert fewer.status_code == 200

"""Tokens that the server counts: the prompt once, every candidate, and what is generated."""

import json

import pytest

from tests.runtime.serve.texts import CHAT, draw


@pytest.fixture(scope="module")
def engine(letters_engine):
    return letters_engine


def count(letters, prompt, candidates, *, behind="", end=1):
    """Tokens of the prompt, once, and of candidates: a token that reaches into both is the candidate's."""
    prompts, own = [], 0
    for candidate in candidates:
        encoding = letters.encode(prompt + candidate + behind)
        before = sum(stop <= len(prompt) for _, stop in encoding.offsets)
        prompts.append(before)
        own += len(encoding.ids) - before + end
    return max(prompts) + own


def usage(read, generated=0, cut=0):
    total = read + generated
    return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": total, "cut_tokens": cut}


@pytest.mark.parametrize("number", [1, 2, 7])
@pytest.mark.parametrize("ending", ["a", "t", "c"])
def test_usage_counts_the_prompt_once_and_every_candidate(post, letters, rng, number, ending):
    prompt, texts = draw(rng) + ending, [draw(rng) for _ in range(number)]
    expected = usage(count(letters, prompt, texts))
    assert post("/v1/best-of-n", {"prompt": prompt, "candidates": texts}).json()["usage"] == expected
    reranked = post("/v1/rerank", {"query": prompt, "documents": texts, "top_n": 1}).json()
    assert reranked["usage"] == expected
    assert reranked["meta"]["tokens"] == {"input_tokens": expected["prompt_tokens"], "output_tokens": 0}
    assert post("/v1/score", {"text_1": prompt, "text_2": texts}).json()["usage"] == expected


def test_usage_of_pairs_counts_each_text_as_often_as_it_was_sent(post, letters, rng):
    prompts, texts = [draw(rng), draw(rng)] * 2, [draw(rng) for _ in range(4)]
    expected = sum(count(letters, prompt, [text]) for prompt, text in zip(prompts, texts, strict=True))
    assert post("/v1/score", {"text_1": prompts, "text_2": texts}).json()["usage"] == usage(expected)


def test_usage_of_messages_counts_what_the_template_writes(post, letters, rng):
    texts = [draw(rng) for _ in range(3)]
    expected = usage(count(letters, "<user>which of them\n<assistant>", texts, behind="\n"))
    assert post("/v1/best-of-n", {"prompt": CHAT, "candidates": texts}).json()["usage"] == expected
    assert post("/v1/rerank", {"query": CHAT, "documents": texts}).json()["usage"] == expected


def test_usage_of_ids_and_of_what_is_not_finished(post, letters, rng):
    ids = [rng.integers(0, 30, rng.integers(1, 9)).tolist() for _ in range(4)]
    answer = post("/v1/best-of-n", {"prompt": ids[0], "candidates": ids[1:]}).json()
    assert answer["usage"] == usage(sum(map(len, ids)))
    assert [entry["tokens"] for entry in answer["candidates"]] == [len(own) for own in ids[1:]]
    body = {"prompt": "which", "candidates": ["one", "other"], "partial": True}
    assert post("/v1/best-of-n", body).json()["usage"] == usage(count(letters, "which", ["one", "other"], end=0))


@pytest.mark.parametrize(
    ("path", "prompt_field", "candidates_field"),
    [
        ("/v1/best-of-n", "prompt", "candidates"),
        ("/v1/rerank", "query", "documents"),
        ("/v1/score", "text_1", "text_2"),
    ],
)
def test_usage_of_a_prompt_that_was_cut(post, letters, rng, path, prompt_field, candidates_field):
    prompt, texts = "".join(draw(rng, 8) for _ in range(12)) + "c", ["one", "other one"]
    whole = count(letters, prompt, texts)
    longest = max(len(letters.encode(text).ids) + 1 for text in texts)
    cut = len(letters.encode(prompt).ids) + longest - 60
    assert cut > 0
    body = {prompt_field: prompt, candidates_field: texts}
    assert post(path, body | {"truncate": True}).json()["usage"] == usage(whole - cut, cut=cut)
    assert "takes at most 60" in post(path, body).json()["message"]


@pytest.mark.parametrize("more", [{}, {"deadline": 60}, {"stream": True}])
@pytest.mark.parametrize("prompt", ["which", CHAT, [1, 2, 3]])
def test_usage_of_what_is_generated(post, model, letters, prompt, more):
    texts = {5: "which", 1: "<user>which of them\n<assistant>"}
    length = 3 if prompt == [1, 2, 3] else len(letters.encode(texts[1] if prompt is CHAT else texts[5]).ids)
    body = {"prompt": prompt, "n": 3, "max_new_tokens": 8, "seed": 2}
    answer = post("/v1/best-of-n", body | more)
    states = [answer.json()] if not more.get("stream") else []
    for line in answer.text.splitlines() if more.get("stream") else []:
        states += [json.loads(line.removeprefix("data: "))] if line.startswith("data: ") else []
    for state in states:
        assert state["usage"] == usage(length, sum(entry["tokens"] for entry in state["candidates"]))
    own = [len(candidate.tokens) for candidate in model.generate(prompt, n=3, max_new_tokens=8, seed=2).candidates]
    assert states[-1]["usage"]["completion_tokens"] == sum(own)

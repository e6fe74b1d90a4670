"""LLM rerankers: an artifact gives what Sentence Transformers gives with the original, or what its makers compute."""

import json
import shutil

import httpx
import numpy as np
import pytest
import torch
from cohere import ClientV2
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForSequenceClassification

import bonnx
from bonnx import InputError
from bonnx.command import main as bonnx_command
from bonnx.export.checkpoint.published_rerankers import PUBLISHED
from bonnx.export.checkpoint.source import Overrides, read_checkpoint
from bonnx.runtime.artifact.manifest import PairRules, Scoring, TextRules
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.rank.request import read_request
from bonnx.runtime.rank.run import run_together
from bonnx.runtime.text.compose import Composer
from bonnx.runtime.text.pair import PairTemplate
from bonnx.runtime.text.reader import Reader
from bonnx.runtime.text.tokenizer import Tokenizer
from tests.command_line import run
from tests.rerankers import (
    DOCUMENTS,
    INSTRUCTION,
    QUERIES,
    TEMPLATE,
    make_causal,
    make_tuned,
    predict,
    published_scores,
    save_description,
)
from tests.runtime.serve.servers import Process
from tests.tolerance import GOLDEN, within

DOCUMENT_FIRST = (
    "{% for m in messages %}{% if m['role'] == 'document' %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] != 'document' %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_end|>' }}{% endif %}"
)
STRUCTURED = (
    "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] if part['type'] == 'text' %} {{ part['text'] }}"
    "{% endfor %}.\n{% endfor %}=>"
)


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A tuned reranker's folder as Sentence Transformers describes it, and its reranker."""
    folder = tmp_path_factory.mktemp("described")
    _, tokenizer = make_tuned(folder / "causal", np.random.default_rng(2))
    tokens = tokenizer.convert_tokens_to_ids(["yes", "no"])
    return folder / "described", save_description(folder / "causal", folder / "described", tokens)


@pytest.fixture(scope="module")
def artifact(described, tmp_path_factory):
    output = tmp_path_factory.mktemp("artifact") / "out"
    assert bonnx_command(["export", "--checkpoint", str(described[0]), "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def model(artifact):
    with_model = bonnx.load(artifact)
    yield with_model
    with_model.close()


def in_order(expected, order):
    """Whether an order is that of the expected scores, but for those that are as good as equal."""
    ordered = np.asarray(expected)[list(order)]
    return bool((np.diff(ordered) <= 1e-6).all())


def test_cohere_ranks_twenty_documents_as_sentence_transformers_does(described, artifact):
    with Process(artifact) as server, httpx.Client(timeout=60) as http:
        client = ClientV2("key", base_url=server.url, httpx_client=http)
        for i, query in enumerate(QUERIES):
            expected = predict(described[1], query, DOCUMENTS)
            reranked = client.rerank(model="described", query=query, documents=list(DOCUMENTS)).results
            order = [result.index for result in reranked]
            assert sorted(order) == list(range(20))
            assert in_order(expected, order)
            assert within([result.relevance_score for result in reranked], expected[order], GOLDEN)
            if i < 2:  # what it was tuned for
                assert {*order[:4]} == {*range(4 * i, 4 * i + 4)}
        body = {"query": QUERIES[0], "documents": DOCUMENTS[:5], "instruction": INSTRUCTION}
        expected = predict(described[1], QUERIES[0], DOCUMENTS[:5], INSTRUCTION)
        for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
            results = http.post(server.url + path, json=body).json()["results"]
            assert within([r["relevance_score"] for r in results], expected[[r["index"] for r in results]], GOLDEN)
        scored = {"text_1": QUERIES[0], "text_2": DOCUMENTS[:5], "instruction": INSTRUCTION}
        data = http.post(f"{server.url}/v1/score", json=scored).json()["data"]
        assert within([each["score"] for each in data], expected, GOLDEN)
        refused = http.post(f"{server.url}/v1/rerank", json={**body, "query": [{"role": "user", "content": "x"}]})
        assert refused.status_code == 400
        assert "query: this model's template makes one text of a query and a document" in refused.text


def test_an_instruction_and_a_prepared_query_give_the_scores_of_whole_texts(described, model):
    for query in QUERIES[:2]:
        for instruction in (None, INSTRUCTION, ""):
            expected = predict(described[1], query, DOCUMENTS, instruction)
            assert within(model.rank(query, DOCUMENTS, instruction=instruction).candidate_scores, expected, GOLDEN)
            assert model.prepare(query, instruction=instruction)
            assert within(model.rank(query, DOCUMENTS, instruction=instruction).candidate_scores, expected, GOLDEN)
    engine = model._engine
    request = read_request(engine, QUERIES[0], DOCUMENTS)
    assert request.continues
    # Everything before the document is computed once.
    text = engine.reader.tokenizer.encode(TEMPLATE.split("<|im_start|>system")[1].split("{{ instr")[0], "text")
    assert len(request.prompt) > len(text)


def test_the_command_and_a_batch_take_an_instruction(described, artifact, tmp_path):
    expected = predict(described[1], QUERIES[0], DOCUMENTS, INSTRUCTION)
    (tmp_path / "documents.txt").write_text("\n".join(DOCUMENTS), encoding="utf-8")
    asked = ["--prompt", QUERIES[0], "--candidates", "documents.txt", "--instruction", INSTRUCTION, "--json"]
    ranked = json.loads(run(tmp_path, "rank", artifact, *asked).stdout)
    assert within(ranked["candidate_scores"], expected, GOLDEN)
    row = {"prompt": QUERIES[0], "candidates": DOCUMENTS}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    done = run(tmp_path, "batch", artifact, "rows.jsonl", "-o", "out.jsonl", "--instruction", INSTRUCTION)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert within(json.loads(line)["candidate_scores"], expected, GOLDEN)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((QUERIES[0], ["x"]), {"partial": True}, "partial: this model's template ends every document"),
        ((QUERIES[0], ["x"]), {"instruction": 3}, "instruction: expected a text; got 3"),
        (([{"role": "user", "content": "x"}], ["x"]), {}, "prompt: this model's template makes one text of a query"),
        ((QUERIES[0], [["a", "b"]]), {}, r"candidates\[0\]: this model's template makes one text"),
        (([1, 2], ["x"]), {}, r"candidates\[0\]: expected token ids, as its prompt"),
        (([1, 2], [[3]]), {"instruction": "x"}, "instruction: it goes into the template of a reranker, with a query"),
        (("a " * 2000, ["x"]), {"truncate": True}, "tokens"),
        (("", ["x"]), {}, "prompt: it has no tokens"),
    ],
)
def test_what_a_template_does_not_take_is_refused(model, arguments, options, message):
    with pytest.raises(InputError, match=message):
        model.rank(*arguments, **options)


def test_an_empty_document_cannot_win(model):
    ranking = model.rank(QUERIES[0], ["", DOCUMENTS[0]])
    assert ranking.best_index == 1
    assert ranking.unreadable == {0: "it has no tokens; expected at least one"}


@pytest.mark.parametrize("template", [DOCUMENT_FIRST, "{{ messages[1].content + messages[0].content }}"])
def test_a_template_that_begins_with_the_document_is_scored_whole(artifact, template):
    engine = open_engine(artifact)
    rules, tokenizer = PairRules(template="x"), engine.reader.tokenizer
    pair = PairTemplate(template, {}, rules)
    engine.reader = Reader(engine.manifest, tokenizer, Composer(TextRules(), None, pair))
    request = read_request(engine, QUERIES[0], DOCUMENTS[:4])
    (ranking,) = run_together(engine, [request])
    assert not len(request.prompt)
    whole = [tokenizer.encode(pair.render(QUERIES[0], document), "text") for document in DOCUMENTS[:4]]
    assert within(ranking.candidate_scores, bonnx.Model(engine).score(whole).row_scores, GOLDEN)
    assert not bonnx.Model(engine).prepare(QUERIES[0])
    engine.close()


def own_scores(folder, source, query, documents, instruction=None):
    """What the network gives in PyTorch for the texts that an artifact would make."""
    path = folder / "own_tokenizer.json"
    path.write_bytes(source.tokenizer.json)
    pair = PairTemplate(source.tokenizer.pair_template, source.tokenizer.special_tokens, source.text.pair)
    passages, special = Composer(source.text, None, pair).pairs(
        query,
        documents,
        "query",
        [f"documents[{i}]" for i in range(len(documents))],
        partial=False,
        instruction=instruction,
    )
    rows = Tokenizer(path, Scoring(), source.text).rows(passages, special=special, partial=False)
    with torch.no_grad():
        ids = [torch.tensor([row.ids]) for row in rows]
        scores = torch.stack([source.model(row, torch.ones_like(row))[1][0, -1, 0] for row in ids])
    return (scores.sigmoid() if source.scoring.activation == "sigmoid" else scores).numpy()


words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=40)


@settings(max_examples=6)
@given(
    family=st.sampled_from(["Qwen2", "Qwen3", "Llama"]),
    template=st.sampled_from([TEMPLATE, DOCUMENT_FIRST, STRUCTURED]),
    one=st.booleans(),
    sigmoid=st.booleans(),
    prompted=st.booleans(),
    stated=st.sampled_from([None, "Prefer facts.\n"]),
    query=words,
    documents=st.lists(words, min_size=1, max_size=3),
    instruction=st.one_of(st.none(), words),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_description_gives_what_sentence_transformers_gives(
    family, template, one, sigmoid, prompted, stated, query, documents, instruction, seed, tmp_path_factory
):
    from sentence_transformers import CrossEncoder

    folder, rng = tmp_path_factory.mktemp("any"), np.random.default_rng(seed)
    make_causal(folder / "causal", rng, family, num_hidden_layers=1)
    tokens = rng.choice(700, 2, replace=False).tolist()
    activation = torch.nn.Sigmoid() if sigmoid else torch.nn.Identity()
    save_description(folder / "causal", folder / "st", tokens[: 2 - one], activation, template)
    for name, change in {
        "sentence_bert_config.json": {"processing_kwargs": {"chat_template": {"add_generation_prompt": prompted}}},
        "config_sentence_transformers.json": {"prompts": {"a": stated or ""}, "default_prompt_name": stated and "a"},
    }.items():
        path = folder / "st" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change), encoding="utf-8")
    encoder = CrossEncoder(str(folder / "st"), device="cpu")
    source = read_checkpoint(folder / "st", Overrides())
    query, documents = f"{query}?", [*documents, *DOCUMENTS[:2]]
    expected = predict(encoder, query, documents, instruction)
    assert within(own_scores(folder, source, query, documents, instruction), expected, GOLDEN)
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", [*PUBLISHED])
def test_a_published_reranker_gives_what_its_makers_compute(kind, tmp_path, rng):
    family = {"mxbai": "Qwen2", "bge-gemma": "Gemma"}.get(kind, "Qwen3")
    causal, tokenizer = make_causal(
        tmp_path / "causal", rng, family, "<bos>" if kind == "bge-gemma" else None, num_hidden_layers=1
    )
    source = read_checkpoint(tmp_path / "causal", Overrides(reranker=kind))
    assert source.model.config.network.num_labels == 1
    # Texts that begin and end with what a tokenizer would merge with the template.
    documents = [*DOCUMENTS, " a\n", "\n\nb. ", "<|im_end|>", "c?"]
    for instruction in (None,) if kind == "zerank" else (None, INSTRUCTION):
        for query in (QUERIES[0], " Why? \n"):
            expected = published_scores(kind, causal, tokenizer, query, documents, instruction)
            assert within(own_scores(tmp_path, source, query, documents, instruction), expected, GOLDEN)
    if kind == "zerank":
        with pytest.raises(InputError, match="instruction: this model's template takes none"):
            own_scores(tmp_path, source, QUERIES[0], documents, INSTRUCTION)
        with pytest.raises(InputError, match="--instruction: the template of this reranker takes none"):
            read_checkpoint(tmp_path / "causal", Overrides(reranker=kind, instruction=INSTRUCTION))


def test_a_described_classifier_goes_through_its_template(tmp_path, rng):
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder.modules import Transformer

    _, tokenizer = make_causal(tmp_path / "causal", rng, num_hidden_layers=1)
    config = Qwen3Config.from_pretrained(tmp_path / "causal", num_labels=1, pad_token_id=0)
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "classifier")
    transformer = Transformer(str(tmp_path / "classifier"), transformer_task="sequence-classification")
    CrossEncoder(modules=[transformer], device="cpu").save_pretrained(str(tmp_path / "st"))
    encoder = CrossEncoder(str(tmp_path / "st"), device="cpu")
    source = read_checkpoint(tmp_path / "st", Overrides())
    expected = predict(encoder, QUERIES[0], DOCUMENTS, INSTRUCTION)
    assert within(own_scores(tmp_path, source, QUERIES[0], DOCUMENTS, INSTRUCTION), expected, GOLDEN)
    # Without the template it joins tokens: then the scorer's own rules count.
    path = tmp_path / "st" / "sentence_bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modality_config": {"text": {}}}))
    assert read_checkpoint(tmp_path / "st", Overrides()).text.pair is None

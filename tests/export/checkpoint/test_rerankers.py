"""LLM rerankers: an artifact gives what Sentence Transformers gives with the original, or what its makers compute."""

import json
import shutil
from dataclasses import replace

import httpx
import msgspec
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
from bonnx.export.checkpoint.published_rerankers import PUBLISHED, published_as
from bonnx.export.checkpoint.source import Overrides, read_checkpoint
from bonnx.models import ConfigError
from bonnx.models.opened import open_checkpoint
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


def test_a_default_instruction_may_be_set_at_export(described):
    source = read_checkpoint(described[0], Overrides(instruction=INSTRUCTION, activation="none"))
    assert source.text.pair.instruction == INSTRUCTION
    assert (source.scoring.activation, source.tokenizer.chat_template) == ("none", None)
    assert not source.remarks


@pytest.mark.parametrize(
    ("repository", "kind"),
    [
        ("Qwen/Qwen3-Reranker-0.6B", "qwen3"),
        ("Qwen/Qwen3-Reranker-8B", "qwen3"),
        ("mixedbread-ai/mxbai-rerank-base-v2", "mxbai"),
        ("mixedbread-ai/mxbai-rerank-large-v1", None),
        ("zeroentropy/zerank-1-small", "zerank"),
        ("zeroentropy/zerank-2-reranker", "zerank"),
        ("ContextualAI/ctxl-rerank-v2-instruct-multilingual-6b", "ctxl"),
        ("BAAI/bge-reranker-v2-gemma", "bge-gemma"),
        ("Qwen/Qwen3-0.6B", None),
        ("someone/Qwen3-Reranker-0.6B", None),
        (None, None),
    ],
)
def test_the_id_on_the_hub_names_a_published_reranker(repository, kind, tmp_path):
    assert published_as(tmp_path, {}, repository) == kind
    if repository is not None:
        cached = tmp_path / f"models--{repository.replace('/', '--')}" / "snapshots" / "0123abc"
        assert published_as(cached, {}, None) == kind


def test_its_own_code_names_a_zerank(tmp_path):
    assert published_as(tmp_path, {"auto_map": {"AutoConfig": "modeling_zeranker.ZEConfig"}}, None) == "zerank"


def test_a_folder_that_nothing_names_needs_the_option(tmp_path, rng):
    folder = tmp_path / "Qwen3-Reranker-0.6B"
    make_causal(folder, rng, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"pass --reranker; for another.*may be a reranker: pass --reranker qwen3"):
        read_checkpoint(folder, Overrides())
    source = read_checkpoint(folder, Overrides(), repository="Qwen/Qwen3-Reranker-0.6B")
    assert (source.scoring.activation, source.text.pair.instruction) == ("sigmoid", None)
    assert read_checkpoint(folder, Overrides(), no_scorer=True, repository="Qwen/Qwen3-Reranker-0.6B").text.pair is None
    labels = Overrides(label_tokens=["yes", "no"])
    assert read_checkpoint(folder, labels, repository="Qwen/Qwen3-Reranker-0.6B").text.pair is None


def test_an_adapter_scores_as_the_published_reranker_that_it_is_on(tmp_path, rng):
    make_causal(tmp_path / "merged", rng, num_hidden_layers=1)
    opened = open_checkpoint(tmp_path / "merged")
    on = replace(opened, source="my-adapter on Qwen/Qwen3-Reranker-0.6B@0123abc")
    assert read_checkpoint(on, Overrides()).text.pair is not None
    on = replace(opened, source="my-adapter on Qwen3-Reranker-0.6B")
    with pytest.raises(ConfigError, match="no scorer that is supported"):
        read_checkpoint(on, Overrides())


def test_a_template_of_llama_cpp_is_rendered_as_it_is(tmp_path, rng):
    make_causal(tmp_path / "causal", rng, num_hidden_layers=1)
    config = Qwen3Config.from_pretrained(tmp_path / "causal", num_labels=1)
    Qwen3ForSequenceClassification(config).save_pretrained(tmp_path / "causal")
    text = 'A {query} "b" {{ c }} \\ é\n<Document>: {document}{% d %}\n\n'
    source = read_checkpoint(replace(open_checkpoint(tmp_path / "causal"), pair_template=text), Overrides())
    pair = PairTemplate(source.tokenizer.pair_template, {}, source.text.pair)
    assert pair.render("{document}", "{query}\n") == (
        text.replace("{query}", "\0").replace("{document}", "{query}\n").replace("\0", "{document}")
    )
    assert source.scoring.activation == "none"


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
    edit("sentence_bert_config.json", modality_config={"text": {}})(tmp_path / "st")
    assert read_checkpoint(tmp_path / "st", Overrides()).text.pair is None


def edit(name, **changes):
    """Change fields of a file of JSON; None removes one."""

    def change(folder):
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return change


def modules(*kinds):
    listed = [{"idx": i, "name": str(i), "path": f"{i}_X" * bool(i), "type": kind} for i, kind in enumerate(kinds)]
    return lambda folder: (folder / "modules.json").write_text(json.dumps(listed))


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


KINDS = "sentence_transformers.base.modules."
REFUSED = {
    "document": (written("chat_template.jinja", "{{ messages[0].content }}"), "ignores the document, so the score"),
    "query": (written("chat_template.jinja", "{{ messages[-1].content }}"), "ignores the query, so the score"),
    "both": (
        written("chat_template.jinja", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}x"),
        "ignores the query and the document",
    ),
    "raises": (written("chat_template.jinja", "{{ raise_exception('no') }}"), "cannot make a text of a query.*: no"),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "add its chat_template.jinja"),
    "no tokenizer": (no_tokenizer, "a reranker reads text, and the checkpoint has no tokenizer"),
    "pooling": (
        modules(
            f"{KINDS}transformer.Transformer", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
        ),
        "modules.json: expected a reranker.*; found Transformer, Pooling",
    ),
    "foreign": (modules(f"{KINDS}transformer.Transformer", "mine.LogitScore"), "modules.json.*; found mine.LogitScore"),
    "no list": (written("modules.json", "3"), "modules.json: expected a list of modules"),
    "no JSON": (written("modules.json", "{"), "modules.json: cannot be read as JSON"),
    "no labels": (lambda folder: (folder / "1_LogitScore/config.json").unlink(), "expected 'true_token_id' and"),
    "no true token": (edit("1_LogitScore/config.json", true_token_id=None), "the id of one token in 'true_token_id'"),
    "same token": (edit("1_LogitScore/config.json", true_token_id=5, false_token_id=5), "found 5 and 5"),
    "outside": (
        edit("1_LogitScore/config.json", true_token_id=10**6),
        "label tokens: 1000000 is outside the vocabulary",
    ),
    "unknown field": (edit("1_LogitScore/config.json", scale=2), "found .*'scale': 2"),
    "activation": (
        edit("config_sentence_transformers.json", activation_fn="torch.nn.modules.activation.Tanh"),
        "'activation_fn': expected Sigmoid or Identity of torch; found 'torch.nn.modules.activation.Tanh'",
    ),
    "prompt": (edit("config_sentence_transformers.json", default_prompt_name="x"), "'x' is not one of 'prompts'"),
    "lower case": (edit("sentence_bert_config.json", do_lower_case=True), "'do_lower_case': True is not supported"),
    "task": (edit("sentence_bert_config.json", transformer_task="fill-mask"), "expected 'text-generation'"),
    "no messages": (edit("sentence_bert_config.json", modality_config={"text": {}}), "expected 'message', by which"),
    "template's name": (
        edit("sentence_bert_config.json", processing_kwargs={"chat_template": {"chat_template": "x"}}),
        "'processing_kwargs': expected variables of the chat template",
    ),
}


@pytest.mark.parametrize("case", [*REFUSED])
def test_a_description_that_is_not_understood_is_refused(described, case, tmp_path):
    change, message = REFUSED[case]
    copy = shutil.copytree(described[0], tmp_path / "copy")
    change(copy)
    with pytest.raises((ConfigError, InputError), match=message):
        read_checkpoint(copy, Overrides())


def test_the_command_refuses_and_writes_nothing(described, tmp_path):
    copy = shutil.copytree(described[0], tmp_path / "copy")
    written("chat_template.jinja", "{{ messages[0].content }}")(copy)
    done = run(tmp_path, "export", "--checkpoint", "copy", "-o", "out")
    assert done.returncode == 1
    assert "its chat template ignores the document" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"reranker": "cohere"}, "--reranker: expected one of qwen3, mxbai, zerank, ctxl, bge-gemma; got 'cohere'"),
        ({"reranker": "qwen3", "label_tokens": ["yes", "no"]}, "--reranker: expected a language model.*--label-tokens"),
        ({"label_tokens": ["yes", "no"], "instruction": "x"}, "--instruction: it goes into the template of a reranker"),
        ({"step_text": "\n"}, "--step-text: a reranker scores whole documents"),
    ],
)
def test_options_that_do_not_go_together_are_refused(described, overrides, message):
    with pytest.raises(InputError, match=message):
        read_checkpoint(described[0], Overrides(**overrides))


def test_a_label_that_the_tokenizer_splits_is_refused(described, tmp_path):
    copy = shutil.copytree(described[0], tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    merged = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [pair for pair in merged if "".join(pair) not in ("Yes", "yes")]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        InputError, match="the reranker answers with a token, and this tokenizer splits it; got 'yes', 2"
    ):
        read_checkpoint(copy, Overrides(reranker="qwen3"))


def test_the_manifest_without_a_pair_is_as_before():
    assert msgspec.to_builtins(TextRules())["pair"] is None

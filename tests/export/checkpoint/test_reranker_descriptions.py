"""How a reranker is recognized: by its description, its hub id, its code or an option. The rest is refused by name."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from bonnx import InputError
from bonnx.export.checkpoint.published_rerankers import published_as
from bonnx.export.checkpoint.source import Overrides, read_checkpoint
from bonnx.models import ConfigError
from bonnx.models.opened import open_checkpoint
from bonnx.runtime.text.pair import PairTemplate
from tests.command_line import run
from tests.rerankers import INSTRUCTION, make_causal, save_description


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A folder as Sentence Transformers describes it."""
    folder = tmp_path_factory.mktemp("described")
    _, tokenizer = make_causal(folder / "causal", np.random.default_rng(3), num_hidden_layers=1)
    save_description(folder / "causal", folder / "st", tokenizer.convert_tokens_to_ids(["yes", "no"]))
    return folder / "st"


def test_a_default_instruction_may_be_set_at_export(described):
    source = read_checkpoint(described, Overrides(instruction=INSTRUCTION, activation="none"))
    assert source.text.pair.instruction == INSTRUCTION
    assert (source.scoring.activation, source.tokenizer.chat_template) == ("none", None)
    assert not source.remarks


def test_the_length_at_which_texts_would_be_cut_is_the_artifact_s_maximum(described, tmp_path):
    folder = shutil.copytree(described, tmp_path / "short")
    path = folder / "sentence_bert_config.json"
    settings = json.loads(path.read_text())
    for longest, expected in ((20, 20), (10**6, None), (None, None)):
        path.write_text(json.dumps(settings | {"max_seq_length": longest}))
        limit = read_checkpoint(folder, Overrides()).limits.max_tokens
        assert limit == (expected or read_checkpoint(described, Overrides()).limits.max_tokens)
    assert read_checkpoint(folder, Overrides(max_tokens=30)).limits.max_tokens == 30
    for wrong in (0, "20", True, 1.5):
        path.write_text(json.dumps(settings | {"max_seq_length": wrong}))
        with pytest.raises(ConfigError, match="'max_seq_length': expected a whole number above 0; found"):
            read_checkpoint(folder, Overrides())


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
    copy = shutil.copytree(described, tmp_path / "copy")
    change(copy)
    with pytest.raises((ConfigError, InputError), match=message):
        read_checkpoint(copy, Overrides())


def test_the_command_refuses_and_writes_nothing(described, tmp_path):
    copy = shutil.copytree(described, tmp_path / "copy")
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
        read_checkpoint(described, Overrides(**overrides))


def test_a_label_that_the_tokenizer_splits_is_refused(described, tmp_path):
    copy = shutil.copytree(described, tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    merged = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [pair for pair in merged if "".join(pair) not in ("Yes", "yes")]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        InputError, match="the reranker answers with a token, and this tokenizer splits it; got 'yes', 2"
    ):
        read_checkpoint(copy, Overrides(reranker="qwen3"))

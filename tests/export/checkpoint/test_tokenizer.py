"""Tokenizer folders as checkpoints have them, held against `AutoTokenizer` of the same folder."""

import json
import subprocess
import sys

import msgspec
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, logging

from bonnx.errors import ExportError
from bonnx.export.checkpoint.tokenizer import check_vocabulary, read_tokenizer
from bonnx.export.checkpoint.tokenizer_check import check_against_transformers
from bonnx.models.config import ConfigError

CORPUS = [
    "The answer to the question is forty-two. We'll check: 12 + 30 = 42, don't worry about the rest.",
    "Step 1: multiply 6 by 7.\nStep 2: write down the answer.\n\n  It is 42.",
    "def answer(x):\n    return x ** 2\n\tprint('the answer', 1234567)",
    "naïve café, größer, Ответ сорок два, 答えは42です",
] * 3
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|im|>{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}"


def train(core, special, alphabet=()):
    trainer = trainers.BpeTrainer(
        vocab_size=460, special_tokens=list(special), initial_alphabet=list(alphabet), show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def sentence_pieces(old):
    """Llama's kind: words begin with a low line, unknown characters are bytes; `old` as transformers 4 wrote it."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if old:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    )
    train(core, ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])
    data = json.loads(core.to_str())  # the bytes are pieces of the vocabulary, not special tokens
    data["added_tokens"] = data["added_tokens"][:3]
    core = Tokenizer.from_str(json.dumps(data))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return core


def byte_level(bos):
    """Llama 3's kind, and Qwen2's."""
    core = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(r" ?\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    core.decoder = decoders.ByteLevel()
    train(core, [], pre_tokenizers.ByteLevel.alphabet())
    core.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|endoftext|>", "<|im|>", "<|end|>")])
    if bos:
        single = [("<|endoftext|>", core.token_to_id("<|endoftext|>"))]
        core.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing("<|endoftext|> $A", None, single)]
        )
    return core


def write(folder, core, model_type, settings, special=None):
    """A folder as older versions of transformers wrote it, whatever this one does."""
    folder.mkdir()
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if special is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def added(core):
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    decoder = core.get_added_tokens_decoder()
    return {str(i): {name: getattr(token, name) for name in fields} for i, token in decoder.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    old, new, llama3, qwen = sentence_pieces(True), sentence_pieces(False), byte_level(True), byte_level(False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    llama = {"tokenizer_class": "LlamaTokenizer", **names, "chat_template": TEMPLATE}
    pad = {"__type": "AddedToken", "content": "[PAD]", "lstrip": True, "rstrip": False, "normalized": False}
    word = {"content": "<word>", "lstrip": False, "rstrip": True, "normalized": True, "single_word": True}
    end = {"eos_token": "<|end|>", "pad_token": "<|endoftext|>", "bos_token": None, "unk_token": None}
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|end|>"}
    cut = byte_level(False)
    cut.enable_truncation(5)
    cut.enable_padding(length=9, pad_token="<|pad|>", pad_id=0)

    for core in (old, new):
        variants = (
            {},
            {"legacy": True},
            {"legacy": False, "add_prefix_space": False},
            {"add_bos_token": False, "add_eos_token": True, "added_tokens_decoder": added(core)},
            {"pad_token": pad, "additional_special_tokens": ["<x>", "<y>"], "image_token": "<image>"},
            {"added_tokens_decoder": {**added(core), "470": {**word, "special": False}}, "pad_token": "</s>"},
        )
        for i, extra in enumerate(variants, start=0 if core is old else len(variants)):
            write(root / f"llama-{i}", core, "llama", {**llama, **extra})
    write(root / "mistral", old, "mistral", {**llama, "legacy": False})
    write(root / "no-config", old, None, llama)
    write(root / "undeclared", old, "llama", {})
    write(root / "old-map", old, "llama", {"tokenizer_class": "LlamaTokenizerFast"}, {**names, "pad_token": "<pad>"})
    write(root / "map-wins", new, "llama", llama, {"eos_token": {**word, "content": "<eot>"}})
    write(root / "llama3", llama3, "llama", fixed)
    write(root / "llama3-declared-llama", llama3, "llama", {**fixed, "tokenizer_class": "LlamaTokenizerFast"})
    write(root / "mistral-bytes", llama3, "mistral", {**fixed, "tokenizer_class": "LlamaTokenizerFast"})
    write(root / "no-settings", llama3, "llama", {})
    (root / "no-settings" / "tokenizer_config.json").unlink()
    for model_type in ("qwen2", "qwen3", "llama"):
        for declared in ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "LlamaTokenizerFast", None):
            settings_ = {"tokenizer_class": declared, **end, "added_tokens_decoder": added(qwen)}
            write(root / f"{model_type}-{declared}", qwen, model_type, settings_)
    write(root / "qwen-prefix", qwen, "qwen2", {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": True})
    write(root / "gpt2", qwen, "llama", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"})
    write(root / "cut", cut, "llama", {"tokenizer_class": "PreTrainedTokenizerFast"})
    write(root / "cut-qwen", cut, "qwen2", {"tokenizer_class": "Qwen2Tokenizer"})

    # Saved by this version's own classes.
    new, qwen = (json.loads(core.to_str())["model"] for core in (new, qwen))
    new, qwen = ({"vocab": m["vocab"], "merges": [tuple(pair) for pair in m["merges"]]} for m in (new, qwen))
    LlamaTokenizer(**new, add_bos_token=True).save_pretrained(root / "saved-llama")
    theirs = Qwen2Tokenizer(**qwen, eos_token="<|end|>")
    theirs.chat_template = {"default": TEMPLATE, "tools": "{{ raise_exception('no tools') }}"}
    theirs.save_pretrained(root / "saved-qwen2")
    theirs = PreTrainedTokenizerFast(tokenizer_object=llama3, bos_token="<|im|>", pad_token="<new>")
    theirs.chat_template = TEMPLATE
    theirs.save_pretrained(root / "saved-general")
    return root


@pytest.fixture(scope="module")
def pairs(folders):
    """(name, our tokenizer, our special tokens, transformers' tokenizer) of every folder."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    result = []
    for folder in sorted(folders.iterdir()):
        files = read_tokenizer(folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        result.append((folder.name, Tokenizer.from_str(files.json.decode()), files, theirs))
    logging.set_verbosity(before)
    return result


marks = ["<s>", "</s>", "[PAD]", "<x>", "<image>", "<word>", "<|im|>", "<|end|>", "<|endoftext|>", "<|pad|>"]
words = [" ", "  ", "\n", "▁", "the answer", " 42", "don't", "Ответ", "é", "\u0301", "x**2"]
pieces = st.sampled_from(marks) | st.sampled_from(words)
drawn = st.lists(pieces | st.text(max_size=6), max_size=7).map("".join)


@settings(max_examples=120)
@given(text=drawn)
def test_the_ids_are_those_of_transformers(pairs, text):
    for name, ours, _, theirs in pairs:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special).ids == expected, name


def test_special_tokens_and_templates_are_those_of_transformers(pairs):
    for name, ours, files, theirs in pairs:
        assert files.special_tokens == theirs.special_tokens_map, name
        assert files.adds_special_tokens == (theirs.num_special_tokens_to_add() > 0), name
        assert ours.get_vocab() == theirs.get_vocab(), name
        assert files.chat_template == (theirs.get_chat_template() if theirs.chat_template else None), name
    assert {files.adds_special_tokens for _, _, files, _ in pairs} == {True, False}
    assert {files.chat_template for _, _, files, _ in pairs} == {TEMPLATE, None}


def test_check_against_transformers_passes_each(folders):
    for folder in folders.iterdir():
        assert check_against_transformers(read_tokenizer(folder)), folder.name


def test_some_files_do_not_give_those_ids_as_they_stand(folders, pairs):
    """Else the rules of the classes would not be tested here."""
    text = "the answer</s>the answer 1234 <|end|> don't"
    names = set()
    for name, _, _, theirs in pairs:
        bare = Tokenizer.from_file(str(folders / name / "tokenizer.json"))
        if bare.encode(text).ids != theirs(text)["input_ids"]:
            names.add(name)
    assert {"llama-0", "cut", "qwen2-PreTrainedTokenizerFast"} <= names
    assert "mistral" not in names
    assert "llama3-declared-llama" not in names


def test_check_names_the_first_text_and_conversation_that_differ(folders):
    files = read_tokenizer(folders / "llama-0")
    other = msgspec.structs.replace(files, json=(folders / "llama-0" / "tokenizer.json").read_bytes())
    with pytest.raises(ExportError, match=r"the tokenizer returns \[.*\] for '.*expected \[.*transformers 5"):
        check_against_transformers(other)
    other = msgspec.structs.replace(files, special_tokens={**files.special_tokens, "bos_token": "<S>"})
    with pytest.raises(ExportError, match=r"the chat template renders '<S>.*expected '<s>.*transformers 5"):
        check_against_transformers(other)


def test_refusals_of_a_template_are_equal_too(folders, tmp_path):
    core = Tokenizer.from_file(str(folders / "mistral" / "tokenizer.json"))
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ strftime_now('%H:%M:%S') }}"
    folder = write(tmp_path / "refuses", core, "mistral", {"chat_template": source})
    assert check_against_transformers(read_tokenizer(folder))


def test_without_transformers_nothing_is_checked(folders):
    code = f"""
import sys
sys.modules["transformers"] = None
from bonnx.export.checkpoint.tokenizer import read_tokenizer
from bonnx.export.checkpoint.tokenizer_check import check_against_transformers
assert check_against_transformers(read_tokenizer({str(folders / "llama-0")!r})) is None
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_templates_by_name(folders, tmp_path):
    assert "no tools" in read_tokenizer(folders / "saved-qwen2", template="tools").chat_template
    with pytest.raises(ConfigError, match="a chat template named 'other'; found: default, tools"):
        read_tokenizer(folders / "saved-qwen2", template="other")
    core = byte_level(False)
    listed = {"chat_template": [{"name": "a", "template": "A"}, {"name": "b", "template": "B"}]}
    folder = write(tmp_path / "listed", core, "llama", listed)
    assert read_tokenizer(folder, template="b").chat_template == "B"
    with pytest.raises(ConfigError, match="named 'default'; found: a, b"):
        read_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("C\n", encoding="utf-8")
    assert read_tokenizer(folder).chat_template == "C\n"
    assert AutoTokenizer.from_pretrained(folder).chat_template == "C\n"
    for wrong in (3, [3], [{"name": "a"}], {"default": 1}):
        folder = write(tmp_path / f"wrong-{len(list(tmp_path.iterdir()))}", core, "llama", {"chat_template": wrong})
        with pytest.raises(ConfigError, match=r"tokenizer_config\.json: chat_template: expected"):
            read_tokenizer(folder)


def test_a_tokenizer_larger_than_the_vocabulary(folders):
    files = read_tokenizer(folders / "llama3")
    last = max(Tokenizer.from_str(files.json.decode()).get_vocab().values())
    check_vocabulary(files, last + 1)
    with pytest.raises(ConfigError, match=rf"tokenizer.json: token '<\|end\|>' has the id {last}.*config.json"):
        check_vocabulary(files, last)
    files = read_tokenizer(folders / "llama-4")
    size = Tokenizer.from_file(str(folders / "llama-4" / "tokenizer.json")).get_vocab_size()
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: token '<y>' has the id"):
        check_vocabulary(files, size)


def test_folders_that_cannot_be_read(folders, tmp_path):
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"tokenizer.json: missing; found tokenizer.model.*save_pretrained"):
        read_tokenizer(tmp_path)
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    folder = write(tmp_path / "unigram", unigram, "llama", {"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(ConfigError, match="expected BPE for LlamaTokenizer; got 'Unigram'"):
        read_tokenizer(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer_class": "GemmaTokenizer"}, "tokenizer_class 'GemmaTokenizer' is not supported"),
        ({"auto_map": {"AutoTokenizer": ["x", None]}}, "Python code is never run"),
        ({"split_special_tokens": True}, "split_special_tokens"),
        ({"added_tokens_decoder": {"x": {}}}, "cannot be read as a tokenizer"),
        ({"bos_token": 3}, "cannot be read as a tokenizer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_refused(options, message, tmp_path):
    folder = write(tmp_path / "tokenizer", byte_level(False), "llama", options)
    with pytest.raises(ConfigError, match=message):
        read_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("[]", "JSON object"), ("{}", "cannot be read as a tokenizer")],
)
def test_files_that_are_no_tokenizer(text, message, tmp_path):
    folder = write(tmp_path / "tokenizer", byte_level(False), "llama", {})
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_tokenizer(folder)

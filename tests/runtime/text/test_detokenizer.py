"""Tokenizer of completions: prompt and text together are what was generated, with every kind of decoder."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bonnx.runtime.artifact.manifest import Scoring, TextRules
from bonnx.runtime.generate.result import FINISH_REASONS
from bonnx.runtime.generate.run import make_candidate
from bonnx.runtime.text import tokenizer
from bonnx.runtime.text.detokenizer import Detokenizer

CORPUS = ["What is two and two? It is 4. The answer, of course.\n", " a  b\tc", "naïve café 🎉 数学"] * 3
SPECIAL = ["<unk>", "<s>", "</s>", "<|assistant|>"]
STRIP = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def sentence_pieces(scheme, decoder):
    """Llama's and Mistral's kind; `prepend` puts the space there as transformers 4 wrote it."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoder
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    core.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=340, special_tokens=[*SPECIAL, *bytes_]))
    vocabulary = core.get_vocab()
    merges = [] if scheme == "never" else [("▁", "t"), ("▁", "I"), ("▁t", "w")]
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges) if a + b not in vocabulary}
    core.model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    fresh = Tokenizer(core.model)  # without the bytes as special tokens
    fresh.normalizer, fresh.pre_tokenizer, fresh.decoder = core.normalizer, core.pre_tokenizer, core.decoder
    fresh.add_special_tokens(SPECIAL)
    fresh.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", fresh.token_to_id("<s>"))])
    return fresh


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet))
    core.add_special_tokens(SPECIAL)
    return core


KINDS = {
    "llama-2": sentence_pieces("prepend", decoders.Sequence(STRIP)),
    "mistral": sentence_pieces("first", decoders.Sequence(STRIP)),
    "always": sentence_pieces("always", decoders.Sequence(STRIP)),
    "metaspace": sentence_pieces("first", decoders.Sequence([STRIP[1], decoders.Metaspace(split=False)])),
    "gemma": sentence_pieces("never", decoders.Sequence(STRIP[:3])),
    "bytes": byte_level(),
}
words = st.text(st.sampled_from("ab tw?I.\nï数🎉"), max_size=8) | st.sampled_from([" two", "It is", "  ", "🎉🎉"])


def special(core):
    return {i for i, token in core.get_added_tokens_decoder().items() if token.special}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    core = KINDS[request.param]
    theirs = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)
    return core, Detokenizer(core, special(core)), theirs


@settings(deadline=None, max_examples=60)
@given(prompt=words.filter(str.strip), said=words, data=st.data())
def test_prompt_and_text_are_what_was_generated(kind, prompt, said, data):
    core, ours, theirs = kind
    ids = core.encode(prompt + said).ids
    place = data.draw(st.integers(1, len(ids)))
    before, own = ids[:place], ids[place:]
    text = ours.text(own, before)
    begun = theirs.decode(before, skip_special_tokens=True)
    if "\ufffd" not in begun:
        assert begun + text == theirs.decode(ids, skip_special_tokens=True)
        assert (begun + text).lstrip(" ") == (prompt + said).lstrip(" ")  # what begins a text cannot be told
    else:
        assert text.endswith(said[-1:])
    assert "".join(ours.pieces(own, before)) == text


@settings(deadline=None, max_examples=60)
@given(prompt=words.filter(str.strip), said=words)
def test_the_texts_of_a_growing_completion_only_grow(kind, prompt, said):
    core, ours, _ = kind
    before, own = core.encode(prompt).ids, core.encode(said, add_special_tokens=False).ids
    texts = [ours.text(own[:i], before, growing=True) for i in range(len(own) + 1)]
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    assert not any("\ufffd" in text for text in texts)
    assert texts[-1] == ours.text(own, before)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_ids(kind, data):
    """Nothing raises, pieces join to the text, and characters that are whole stay whatever bytes follow."""
    core, ours, theirs = kind
    token = st.integers(0, core.get_vocab_size() - 1)
    if len(ours._bytes):
        token |= st.sampled_from(sorted(ours._bytes))
    before, own = data.draw(st.lists(token, min_size=1, max_size=12)), data.draw(st.lists(token, max_size=12))
    text = ours.text(own, before)
    plain = [i for i in own if i not in special(core)]
    assert "".join(ours.pieces(plain, before)) == text
    assert text.rstrip("\ufffd").startswith(ours.text(own, before, growing=True))
    whole, begun = (theirs.decode(ids, skip_special_tokens=True) for ids in ([*before, *own], before))
    if begun and "\ufffd" not in begun + whole:
        assert begun + text == whole


def test_a_space_is_kept_behind_words_and_taken_where_the_text_begins():
    core = KINDS["mistral"]
    ours, first = Detokenizer(core, special(core)), core.token_to_id("▁tw")
    assistant, begin = core.token_to_id("<|assistant|>"), core.token_to_id("<s>")
    assert ours.text([first], core.encode("is").ids) == " tw"
    assert ours.text([first], [*core.encode("is").ids, assistant]) == " tw"
    assert ours.text([first], [begin, assistant]) == " tw"  # a template's, which the encoder gives no space
    assert ours.text([first], [begin]) == ours.text([first], []) == "tw"
    assert ours.pieces([first, first]) == [" tw", " tw"]
    assert ours.text([], [begin]) == ours.text([], core.encode("is").ids) == ""


def test_bytes_that_are_no_character_leave_the_others_alone():
    core = KINDS["mistral"]
    ours = Detokenizer(core, special(core))
    byte = [core.token_to_id(f"<0x{i:02X}>") for i in range(256)]
    party = [byte[b] for b in "🎉".encode()]
    before = core.encode("a").ids
    assert ours.text([*party, *party[:2]], before) == "🎉\ufffd\ufffd"
    assert ours.text([*party, *party[:2]], before, growing=True) == "🎉"
    assert ours.text(party[1:], [*before, *party[:1]]) == "🎉"
    assert ours.text([*party, byte[0xFF], *party], [*before, *party]) == "🎉\ufffd🎉"
    assert ours.pieces([*party, byte[0xFF], *party], before) == ["", "", "", "🎉", "", "", "", "", "\ufffd🎉"]


def test_a_character_that_the_tokenizer_has_as_u_fffd_is_a_character():
    core = KINDS["bytes"]
    ours, before = Detokenizer(core, special(core)), core.encode("a").ids
    own = core.encode("b\ufffd c\ufffd").ids
    assert ours.text(own, before) == "".join(ours.pieces(own, before)) == "b\ufffd c\ufffd"


def test_long_completions_take_linear_time():
    core = KINDS["mistral"]
    ours, before = Detokenizer(core, special(core)), core.encode("a").ids
    own = core.encode("It is 数学. " * 2000).ids[1:]
    assert len(own) > 20_000
    assert "".join(ours.pieces(own, before)) == ours.text(own, before) == " It is 数学." + " It is 数学." * 1999 + " "


@pytest.mark.parametrize("reason", ["stop", "length", None])
def test_a_candidate_has_the_words_and_not_the_token_that_ended_it(reason, tmp_path):
    core = KINDS["mistral"]
    core.save(str(tmp_path / "tokenizer.json"))
    end = core.token_to_id(".")
    text = tokenizer.Tokenizer(tmp_path / "tokenizer.json", Scoring(end_token=end), TextRules(unknown="replace"))
    prompt = np.array(core.encode("two").ids)
    own = np.array(core.encode("two It. is.").ids[len(prompt) :])
    given = FINISH_REASONS.index(reason) if reason else -1
    zeros = np.zeros(len(own), np.float32)
    found = make_candidate(text.decode, prompt, own, zeros, zeros, len(own), 0.0, given)
    assert found.text == (" It. is" if reason == "stop" else " It. is.")
    assert len(found.tokens) == len(own)

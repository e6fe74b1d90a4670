"""Texts that end a completion: one token in the graph, several tokens in the host's loop."""

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bonnx.models.countdown.vocabulary import decode
from bonnx.runtime.artifact.manifest import Scoring, TextRules
from bonnx.runtime.text.stops import before_stop, held_back
from bonnx.runtime.text.tokenizer import Tokenizer
from tests.tolerance import RUNTIME, within

PUZZLE = "3,7,20,24>1:"
OPTIONS = {"n": 4, "seed": 3, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def english():
    """A byte-level tokenizer, as most models have, with long tokens."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["the end.\n\n the end.\n\n"] * 9, trainer)
    return core


@pytest.fixture(scope="module")
def text(english, tmp_path_factory):
    path = tmp_path_factory.mktemp("stops") / "tokenizer.json"
    english.save(str(path))
    return Tokenizer(path, Scoring(end_token=0), TextRules(unknown="replace"))


def cut(tokens, stops):
    """How many tokens a completion has when it ends at the first stop text, and its text."""
    for length in range(1, len(tokens) + 1):
        whole = decode(tokens[:length])
        places = [whole.find(stop) for stop in stops if stop in whole]
        if places:
            return length, whole[: min(places)]
    return len(tokens), decode(tokens)


@pytest.mark.parametrize("stops", [["=4;"], ["-3=", ";2"], ["4;", ";"], ["7-3=4;20"]], ids=str)
def test_a_completion_ends_at_a_text_of_several_tokens(puzzler, stops):
    """Tokens and scores are those of an unhindered completion, up to the token that completes the text."""
    free = puzzler.generate(PUZZLE, stop=[], **OPTIONS)
    stopped = puzzler.generate(PUZZLE, stop=stops, **OPTIONS)
    assert any(candidate.finish_reason == "stop" for candidate in stopped.candidates)
    for whole, candidate in zip(free.candidates, stopped.candidates, strict=True):
        length, expected = cut(whole.tokens.tolist(), stops)
        assert candidate.tokens.tolist() == whole.tokens[:length].tolist()
        assert (candidate.text, candidate.finish_reason) == (expected, "stop" if length < 40 else "length")
        assert within(candidate.scores, whole.scores[:length], RUNTIME)
        assert candidate.score == candidate.scores[-1]
    *_, last = puzzler.stream(PUZZLE, stop=stops, **OPTIONS)
    assert [c.text for c in last.candidates] == [c.text for c in stopped.candidates]


def test_a_growing_text_only_grows(puzzler):
    """What may be the beginning of a stop text is held back until it is known."""
    before = [""] * 4
    for state in puzzler.stream(PUZZLE, stop=["=4;", "7-3=4;20+"], **OPTIONS):
        texts = [candidate.text for candidate in state.candidates]
        assert all(text.startswith(old) for text, old in zip(texts, before, strict=True))
        assert all("=4;" not in text for text in texts)
        before = texts


def test_one_token_of_several_texts_ends_a_completion_in_the_loop_too(puzzler):
    alone = puzzler.generate(PUZZLE, stop=[";"], **OPTIONS)
    *_, streamed = puzzler.stream(PUZZLE, stop=[";"], **OPTIONS)
    beside = puzzler.generate(PUZZLE, stop=[";", "123+456"], **OPTIONS)
    for other in (streamed, beside):
        assert [c.text for c in other.candidates] == [c.text for c in alone.candidates]
        assert [c.tokens.tolist() for c in other.candidates] == [c.tokens.tolist() for c in alone.candidates]


@pytest.mark.parametrize("method", ["best_of_n", "beam"])
def test_a_search_stops_at_texts(puzzler, method):
    result = puzzler.search(PUZZLE, method, 4, stop=["=4;"], seed=3)
    assert all("=4;" not in candidate.text for candidate in result.candidates)
    ended = [c for c in result.candidates if decode(c.tokens.tolist()).endswith("=4;")]
    assert ended
    assert all(c.finish_reason == "stop" for c in ended)


def test_a_token_that_holds_a_stop_text_ends_too(text, english):
    """A model that writes an empty line as one token writes a line's end, too."""
    empty_line = english.token_to_id("ĊĊ")
    assert empty_line is not None
    assert empty_line in text.stop_tokens("\n")
    assert text.stop_tokens("<end>") == [0]
    ids = english.encode("the end.\n\n").ids
    assert text.decode(ids, [], "stop", ["\n"]) == "the end."
    assert text.decode(ids, [], "length", ["\n"]) == "the end.\n\n"


@pytest.mark.parametrize("stop", ["e e", "🎉", "end. ", "é\n"], ids=str)
def test_texts_are_found_across_the_bytes_of_characters(text, english, stop, dice):
    """Against a plain search in the whole text, at every length."""
    written = "the 🎉 end. é\nthe e e🎉é\n end. the"
    prompt, ids = english.encode("so ").ids, english.encode(written).ids
    assert text.stop_tokens(stop) == []
    lengths = [n for n in range(1, len(ids) + 1) if stop in english.decode(ids[:n])]
    assert [text.ends_in_stop(ids[:n], prompt, [stop]) for n in range(1, lengths[0] + 1)] == [False] * (
        lengths[0] - 1
    ) + [True]
    assert text.decode(ids[: lengths[0]], prompt, "stop", [stop]) == written[: written.index(stop)]


def test_borders():
    assert before_stop("a;b;", [";"], 3) == "a;b"
    assert before_stop("a;b;", [";"], 0) == "a"
    assert before_stop("abc", ["bc", "abc"], 2) == ""
    assert before_stop("abc", ["x"], 0) is None
    assert held_back("so long\nHu", ["Human:", "\nHuman:"]) == 3
    assert held_back("aa", ["aab", "aac"]) == 2
    assert held_back("abc", ["x"]) == held_back("", ["x"]) == 0
    assert np.all([held_back("ab" * 3, ["ab" * 5]) == 6])

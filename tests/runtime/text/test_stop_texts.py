"""Stop texts in what every kind of tokenizer writes, against a search in the whole text."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonnx.runtime.artifact.manifest import Scoring, TextRules
from bonnx.runtime.text.tokenizer import Tokenizer
from tests.runtime.text.test_detokenizer import KINDS, words


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("stop") / "tokenizer.json"
    KINDS[request.param].save(str(path))
    return KINDS[request.param], Tokenizer(path, Scoring(end_token=2), TextRules(unknown="replace"))


@settings(max_examples=60)
@given(prompt=words, said=st.lists(words, min_size=1, max_size=4).map("".join).filter(bool), data=st.data())
def test_a_stop_text_is_found_where_its_last_character_is_written(kind, prompt, said, data):
    core, ours = kind
    before, own = core.encode(prompt).ids, core.encode(said, add_special_tokens=False).ids
    # A special token in between writes nothing.
    place = data.draw(st.integers(0, len(own)))
    own = [*own[:place], *data.draw(st.sampled_from([[], [core.token_to_id("<|assistant|>")]])), *own[place:]]
    texts = [ours.decode(own[:n], before, None) for n in range(len(own) + 1)]
    start = data.draw(st.integers(0, max(0, len(texts[-1]) - 1)))
    stops = [texts[-1][start : start + data.draw(st.integers(1, 6))], "never"]
    if not stops[0]:
        return
    first = next(n for n, text in enumerate(texts) if stops[0] in text)
    assert [ours.ends_in_stop(own[:n], before, stops) for n in range(1, first + 1)] == [False] * (first - 1) + [True]
    assert ours.decode(own[:first], before, "stop", stops) == texts[first][: texts[first].index(stops[0])]
    grown = [ours.decode(own[:n], before, None, stops) for n in range(first)]
    assert all(text.startswith(old) for old, text in itertools.pairwise(grown))
    assert ours.decode(own[:first], before, "stop", stops).startswith(grown[-1])


@settings(max_examples=60)
@given(said=words.filter(bool), data=st.data())
def test_a_stop_text_of_one_token_ends_at_every_token_that_holds_it(kind, said, data):
    """In the graph: a token that is not among these adds no text that holds it by itself."""
    core, ours = kind
    stop = data.draw(st.sampled_from(sorted(set(said))))
    ids = ours.stop_tokens(stop)
    if not ids:
        return
    assert ours.pieces(ids[:1]) == [stop]
    others = {i for i in range(core.get_vocab_size()) if not ours.is_special(i)} - {*ids}
    assert not [i for i in others if stop in ours.pieces([i])[0]]

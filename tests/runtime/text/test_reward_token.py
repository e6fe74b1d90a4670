"""A token that is appended to every text, because the score is read there."""

import pytest

from bonnx.runtime.artifact.manifest import Scoring, TextRules
from bonnx.runtime.text.tokenizer import Passage, Tokenizer
from tests.checkpoints import ANSWERS, QUESTION, make_tokenizer


@pytest.mark.parametrize("partial", [False, True])
def test_every_text_ends_with_it_once(tmp_path, partial):
    core = make_tokenizer("bytes")
    core.save_pretrained(tmp_path)
    token = core.convert_tokens_to_ids("<extra_0>")
    ours = Tokenizer(tmp_path / "tokenizer.json", Scoring(reward_token=token), TextRules())
    texts = [QUESTION + answer for answer in (*ANSWERS, ANSWERS[0] + "<extra_0>")]
    passages = [Passage(text, len(QUESTION), len(text)) for text in texts]
    rows = ours.rows(passages, special=False, partial=partial)
    expected = [core(text.removesuffix("<extra_0>") + "<extra_0>")["input_ids"] for text in texts]
    assert [row.ids for row in rows] == expected

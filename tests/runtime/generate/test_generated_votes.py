"""`generate(vote=, answers=)`: generated candidates vote by the rules of `rank`."""

import pytest

import bonnx
from bonnx import InputError
from tests.tolerance import RUNTIME, within

PUZZLE = "3,7,12,25>98:"


@pytest.mark.parametrize("vote", ["majority", "weighted", "score"])
def test_generated_candidates_vote(puzzler, vote):
    """The choice is that of `rank` on the same texts; the candidates are those of a choice by score."""
    result = puzzler.generate(PUZZLE, n=8, seed=5, vote=vote, answers="number")
    plain = puzzler.generate(PUZZLE, n=8, seed=5)
    assert [c.text for c in result.candidates] == [c.text for c in plain.candidates]
    ranking = puzzler.rank(PUZZLE, [c.text for c in result.candidates], vote=vote, answers="number")
    assert (result.best_index, result.answers) == (ranking.best_index, ranking.answers)
    assert (result.group_scores is None) == (vote == "score")
    assert vote == "score" or within(result.group_scores, ranking.group_scores, RUNTIME)
    assert "answer" in result._repr_html_()
    assert plain.to_dict().keys() == result.to_dict().keys() - {"answers", "group_scores"}


def test_answers_of_token_ids(babbler):
    """Without a tokenizer a function reads the ids; a fake model votes by the same rules."""
    result = babbler.generate([1, 2, 3], n=6, max_new_tokens=5, vote="majority", answers=lambda ids: ids[0] % 2)
    assert result.answers == tuple(candidate.tokens[0] % 2 for candidate in result.candidates)
    fake = bonnx.FakeModel(lambda prompt, text: len(text), lambda prompt, number: "aab"[number] * (number + 1))
    assert fake.generate("p", n=3).best_index == 2
    assert fake.generate("p", n=3, vote="majority", answers=lambda text: text[0]).best_index == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vote": "majority"}, "needs answers"),
        ({"answers": ["a"]}, "there are no candidates yet"),
        ({"vote": "x"}, "vote"),
    ],
    ids=str,
)
def test_votes_that_cannot_be(puzzler, options, message):
    with pytest.raises(InputError, match=message):
        puzzler.generate(PUZZLE, **options)

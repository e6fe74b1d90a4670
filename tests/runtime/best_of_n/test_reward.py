"""A model as the reward function of a trainer."""

import math

import pytest

import bonnx
from bonnx.errors import InputError


def chat(text):
    return [{"role": "user", "content": text}]


def reply(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("wrap", [(str, str), (chat, reply)], ids=["texts", "messages"])
def test_rewards_of_a_batch(wrap):
    """As TRL calls it: prompts repeated for each of their completions, and columns of the dataset beside them."""
    prompt_of, completion_of = wrap
    calls = []

    def score(prompt, completion):
        calls.append(prompt)
        text = completion if isinstance(completion, str) else completion[0]["content"]
        return math.nan if text == "nothing" else len(text)

    reward = bonnx.reward_function(bonnx.FakeModel(score), name="length")
    prompts = [prompt_of(text) for text in ["a", "a", "b", "b", "c"]]
    completions = [completion_of(text) for text in ["one", "", "three", "nothing", ""]]
    assert reward(prompts=prompts, completions=completions, answer=[1] * 5, trainer_state=None) == [
        3,
        None,
        5,
        None,
        None,
    ]
    assert reward.__name__ == "length"
    assert calls == [prompts[0], prompts[2], prompts[2]]


def test_lists_that_do_not_fit():
    reward = bonnx.reward_function(bonnx.FakeModel(lambda prompt, completion: 1.0))
    with pytest.raises(InputError, match="equally long lists"):
        reward(prompts=["a"], completions=["x", "y"])


def test_rewards_are_the_scores_of_rank(countdown):
    model, prompt = bonnx.load(countdown, provider="cpu"), "3,7,20,24>1:"
    completions = ["24-20=4;7-4=3;3/3=1;", "24/3=8;20-7=13;13-8=1;"]
    rewards = bonnx.reward_function(model)(prompts=[prompt] * 2, completions=completions)
    assert rewards == model.rank(prompt, completions).candidate_scores.tolist()
    # An untrained policy writes what the scorer cannot read, sometimes all completions of a prompt.
    unreadable = bonnx.reward_function(model)(prompts=[prompt] * 3, completions=[*completions[:1], "1234", "no"])
    assert unreadable[0] == pytest.approx(rewards[0])
    assert unreadable[1:] == [None, None]
    assert bonnx.reward_function(model)(prompts=[prompt] * 2, completions=["1234", "no"]) == [None, None]

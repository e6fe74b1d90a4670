"""`ModelLike`: what a program is written against, a model or its stand-in."""

import inspect

import pytest

import bonnx
from bonnx.runtime.generate.options import DEFAULTS, SEARCH_OPTIONS, GenerateOptions, option_help
from bonnx.runtime.protocol import ModelLike
from bonnx.runtime.testing import FakeModel

VERBS = [name for name in vars(ModelLike) if not name.startswith("_") and name != "provider"]


def best_answer(model: bonnx.ModelLike, question: str) -> str:
    """A program of a user's."""
    candidates = [candidate.text for candidate in model.generate(question, n=3).candidates]
    return model.rank(question, candidates).best


def test_a_stand_in_takes_a_models_place(countdown):
    fake = bonnx.FakeModel(lambda prompt, candidate: len(candidate), lambda prompt, number: "x" * (number + 1))
    assert best_answer(fake, "how many?") == "xxx"
    assert isinstance(best_answer(bonnx.load(countdown), "3,7,20,24>1:"), str)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", [bonnx.Model, FakeModel])
def test_model_and_stand_in_have_the_signatures_of_the_protocol(kind, verb):
    assert inspect.signature(getattr(kind, verb)) == inspect.signature(getattr(ModelLike, verb))


def test_a_model_has_seven_verbs_and_says_what_it_is():
    public = {name for name in dir(bonnx.Model) if not name.startswith("_")}
    verbs = {"prepare", "rank", "score", "generate", "stream", "search", "close"}
    assert public == verbs | {"manifest", "provider"}


@pytest.mark.parametrize(
    ("method", "names"),
    [(bonnx.Model.generate, DEFAULTS), (bonnx.Model.stream, DEFAULTS), (bonnx.Model.search, SEARCH_OPTIONS)],
    ids=["generate", "stream", "search"],
)
def test_help_shows_every_option_with_its_default(method, names):
    parameters = inspect.signature(method).parameters
    for name in names:
        assert parameters[name].default == DEFAULTS[name]
        assert f"    {name}: {option_help(name)}. Default: {DEFAULTS[name]}.\n" in method.__doc__
    assert (inspect.Parameter.VAR_KEYWORD in {p.kind for p in parameters.values()}) == (names is SEARCH_OPTIONS)


def test_the_options_and_their_defaults_are_one_list():
    assert list(GenerateOptions.__annotations__) == list(DEFAULTS)

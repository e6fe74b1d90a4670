"""A language model without a scorer: it generates, chooses by its certainty or by votes, and refuses to score."""

import copy

import httpx
import numpy as np
import pytest
import torch

import bonnx
from bonnx import InputError
from bonnx.export.artifact import export_model
from bonnx.export.checkpoint.source import Overrides, read_checkpoint
from bonnx.models import ConfigError, save_checkpoint
from bonnx.models.network import without_scorer
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.verification import verify
from tests.checkpoints import make
from tests.runtime.serve.servers import served
from tests.tolerance import RUNTIME, within

PROMPT = [5, 9, 100, 7]


@pytest.fixture(scope="module")
def folder(language_model, tmp_path_factory):
    """Artifact of the small language model without its scorer."""
    folder = tmp_path_factory.mktemp("no_scorer") / "artifact"
    export_model(without_scorer(copy.deepcopy(language_model)), folder, name="silent")
    return folder


@pytest.fixture(scope="module")
def generator(folder):
    return bonnx.load(folder)


@pytest.fixture(scope="module")
def generation(generator):
    return generator.generate(PROMPT, n=5, max_new_tokens=9, temperature=0.8, seed=4)


def test_the_score_of_a_token_is_the_self_certainty_of_what_it_was_drawn_from(generation, language_model):
    for candidate in generation.candidates:
        with torch.no_grad():
            logits = language_model(torch.tensor([[*PROMPT, *candidate.tokens]]))[2][0, len(PROMPT) - 1 : -1]
        # The divergence of the prediction from the uniform distribution, as Kang et al. write it.
        expected = -(logits.softmax(-1) * logits.shape[-1]).log().mean(-1)
        assert within(candidate.scores, expected, RUNTIME)
        assert within([candidate.score], expected.mean()[None], RUNTIME)
    scores = [candidate.score for candidate in generation.candidates]
    assert generation.best_index == int(np.argmax(scores))
    assert generation.aggregation == "mean"


def test_the_loop_on_the_host_and_a_search_give_the_same(generator, generation):
    *_, streamed = generator.stream(PROMPT, n=5, max_new_tokens=9, temperature=0.8, seed=4)
    sought = generator.search(PROMPT, "best_of_n", 5, max_new_tokens=9, temperature=0.8, seed=4)
    for result in (streamed, sought):
        for one, other in zip(generation.candidates, result.candidates, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert within(one.scores, other.scores, RUNTIME)
        assert result.best_index == generation.best_index


def test_pruning_keeps_the_most_certain(generator, generation):
    pruned = generator.generate(
        PROMPT, n=5, max_new_tokens=9, temperature=0.8, seed=4, prune_every=9, prune_keep=0.2
    ).candidates
    assert [candidate.finish_reason != "pruned" for candidate in pruned].index(True) == generation.best_index


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("self_certainty", {}),
        ("majority", {"answers": lambda tokens: tokens[0] % 2}),
        ("adaptive", {"vote": "majority", "answers": lambda tokens: tokens[0] % 2}),
        ("beam", {"scorer": len}),
    ],
)
def test_methods_that_need_no_scorer_or_get_one(generator, method, options):
    assert generator.search(PROMPT, method, 4, max_new_tokens=4, **options).candidates


REFUSED = {
    "rank": (lambda model: model.rank(PROMPT, [[1, 2]]), "ranking needs a scorer"),
    "score": (lambda model: model.score([[1, 2]]), "scoring needs a scorer"),
    "beam": (lambda model: model.search(PROMPT, "beam", 4), "'beam' needs a scorer.*; pass scorer, or train"),
    "adaptive": (lambda model: model.search(PROMPT, "adaptive", 4), "pass scorer or a vote, or train a scorer"),
    "BestOfN": (lambda model: bonnx.BestOfN(model, model), "pass it as generate"),
    "reward": (lambda model: bonnx.reward_function(model)(prompts=["a"], completions=["b"]), "needs a scorer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_a_scorer_is_refused(name, generator):
    call, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        call(generator)


def test_a_server_generates_and_refuses_to_rank(folder, generation):
    with served(open_engine(folder)) as url, httpx.Client(base_url=url, timeout=60) as client:
        options = {"n": 5, "max_new_tokens": 9, "temperature": 0.8, "seed": 4}
        answer = client.post("/v1/best-of-n", json={"prompt": PROMPT, **options}).json()
        assert answer["best_index"] == generation.best_index
        refused = client.post("/v1/best-of-n", json={"prompt": PROMPT, "candidates": [[1]]})
        assert refused.status_code == 400
        assert "exported with --no-scorer" in refused.json()["message"]
        adaptive = {"model": "silent", "prompt": "a", "bonnx": {"method": "adaptive"}}
        assert "send a vote" in client.post("/v1/completions", json=adaptive).json()["message"]


def test_recorded_cases_are_verified(folder):
    _, checks = verify(folder)
    assert [check.case for check in checks] in (["generate/1"], ["prefill/1"])


def test_the_first_distribution_is_recorded_where_no_draw_is_clear(language_model, tmp_path, monkeypatch):
    monkeypatch.setattr("bonnx.export.verify.generate._RECORDED", ())
    export_model(without_scorer(copy.deepcopy(language_model)), tmp_path / "out", name="silent", verification="quick")
    assert [check.case for check in verify(tmp_path / "out")[1]] == ["prefill/1"]


def test_a_checkpoint_of_transformers_needs_no_scorer(tmp_path, rng):
    make(tmp_path / "causal", "Qwen2", "step tag", rng, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="or pass --no-scorer"):
        read_checkpoint(tmp_path / "causal", Overrides())
    source = read_checkpoint(tmp_path / "causal", Overrides(), no_scorer=True)
    assert source.scoring.token_score == "self_certainty"
    assert source.scoring.stop_tokens
    assert not any("scorer" in name for name, _ in source.model.named_parameters())
    with pytest.raises(InputError, match="--no-scorer: --label-tokens belongs to a scorer"):
        read_checkpoint(tmp_path / "causal", Overrides(label_tokens=["1", "0"]), no_scorer=True)


def test_a_scorer_is_left_out_and_a_model_that_only_scores_is_refused(language_model, network, tmp_path, rng):
    save_checkpoint(language_model, tmp_path / "both")
    source = read_checkpoint(tmp_path / "both", Overrides(), no_scorer=True)
    assert source.scoring.aggregation == "mean"
    assert not any("scorer" in name for name, _ in source.model.named_parameters())
    save_checkpoint(source.model, tmp_path / "without")
    assert read_checkpoint(tmp_path / "without", Overrides()).scoring.token_score == "self_certainty"
    save_checkpoint(network, tmp_path / "network")
    with pytest.raises(ConfigError, match="expected a language model"):
        read_checkpoint(tmp_path / "network", Overrides(), no_scorer=True)
    make(tmp_path / "reward", "Llama", "reward", rng)
    with pytest.raises(ConfigError, match="vocabulary head"):
        read_checkpoint(tmp_path / "reward", Overrides(), no_scorer=True)

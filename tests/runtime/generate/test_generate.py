"""`generate` and `stream`: tokens, scores and choices against PyTorch, the promises of `seed`, bad input refused."""

import json
import time

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import bonnx
from bonnx import ArtifactError, InputError
from bonnx.export.verify.draws import uniform
from bonnx.models import load_checkpoint
from bonnx.models.countdown import CHECKPOINT
from bonnx.models.countdown.vocabulary import END, decode, encode
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.generate.growing import Growing
from bonnx.runtime.generate.options import check_options
from bonnx.runtime.text.stops import Stops
from tests.tolerance import RUNTIME, within

PUZZLE = "3,7,12,25>98:"


def sequences(result):
    return [candidate.tokens.tolist() for candidate in result.candidates]


def test_tokens_are_pytorchs_with_the_same_uniforms(puzzler):
    pytorch, _ = load_checkpoint(CHECKPOINT)
    prompt, seed = encode(PUZZLE), 11
    result = puzzler.generate(PUZZLE, n=6, seed=seed)
    for number, candidate in enumerate(result.candidates):
        row, sampled = list(prompt), []
        while len(sampled) < 54 and sampled[-1:] != [END]:
            with torch.no_grad():
                _, scores, logits = pytorch(torch.tensor([row]))
            sums = logits[0, -1].double().softmax(-1).cumsum(-1)
            point = uniform(seed, np.array(prompt), len(sampled), number)
            sampled.append(int(torch.searchsorted(sums, torch.tensor(point), right=True)))
            row.append(sampled[-1])
        assert candidate.tokens.tolist() == sampled
        with torch.no_grad():
            _, scores, logits = pytorch(torch.tensor([row]))
        assert within(candidate.scores, scores[0, len(prompt) :, 0].sigmoid(), RUNTIME)
        log_probs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)[range(len(sampled)), sampled]
        assert within(candidate.log_probs, log_probs, RUNTIME)
        assert candidate.score == candidate.scores[-1]
    assert result.best_index == int(np.argmax([c.score for c in result.candidates]))
    assert result.best is result.candidates[result.best_index]


def test_what_was_generated_ranks_as_it_was_scored(puzzler):
    result = puzzler.generate(PUZZLE, n=9, seed=3, aggregation="step_min")
    ranking = puzzler.rank(PUZZLE, [c.tokens for c in result.candidates], aggregation="step_min")
    assert ranking.best_index == result.best_index
    assert within(ranking.candidate_scores, [c.score for c in result.candidates], RUNTIME)
    assert all(within(a, c.scores, RUNTIME) for a, c in zip(ranking.scores, result.candidates, strict=True))
    # Text is for people: a malformed sample may set two numbers side by side, which read as one.
    texts = [c.text for c in result.candidates]
    assert all(
        encode(t) == c.tokens.tolist()[:-1] for t, c in zip(texts, result.candidates, strict=True) if len(t) < 25
    )


def test_the_promises_of_seed(puzzler):
    sixteen = puzzler.generate(PUZZLE, n=16, seed=-5)
    assert sequences(puzzler.generate(PUZZLE, n=16, seed=-5)) == sequences(sixteen)
    assert sequences(puzzler.generate(PUZZLE, n=8, seed=-5)) == sequences(sixteen)[:8]
    assert sequences(puzzler.generate(PUZZLE, n=16, seed=-4)) != sequences(sixteen)
    assert len({tuple(row) for row in sequences(sixteen)}) > 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"top_k": 4, "temperature": 1.5},
        {"top_p": 0.8, "prune_every": 3},
        {"stop": [1, 5, 77, 100], "prune_every": 2, "prune_keep": 0.7},
        {"aggregation": "mean", "prune_every": 4, "prune_keep": 0.3},
        {"aggregation": "step_prod", "stop": list(range(60, 90))},
    ],
)
def test_the_host_steers_to_the_same_candidates(babbler, options, rng):
    prompt = rng.integers(0, 130, int(rng.integers(1, 20)))
    options = {"n": 13, "max_new_tokens": 17, "seed": int(rng.integers(2**40)), **options}
    whole = babbler.generate(prompt, **options)
    *_, last = babbler.stream(prompt, **options)
    assert sequences(last) == sequences(whole)
    assert [c.finish_reason for c in last.candidates] == [c.finish_reason for c in whole.candidates]
    assert (last.best_index, last.prompt_tokens) == (whole.best_index, len(prompt))
    assert last.computed_tokens == whole.computed_tokens == sum(len(c.tokens) for c in whole.candidates)
    for a, b in zip(last.candidates, whole.candidates, strict=True):
        assert within(a.scores, b.scores, RUNTIME)
        assert within(a.log_probs, b.log_probs, RUNTIME)
        assert np.isnan(a.score) == np.isnan(b.score) == (b.finish_reason == "pruned")
        assert np.isnan(a.score) or within([a.score], [b.score], RUNTIME)
    if options.get("temperature") == 0.0:
        assert len({tuple(row) for row in sequences(whole)}) == 1


def test_pruning_keeps_the_best_by_their_score_so_far(babbler, rng):
    prompt, options = rng.integers(0, 130, 6), {"n": 16, "max_new_tokens": 12, "seed": int(rng.integers(2**40))}
    free = babbler.generate(prompt, **options)
    pruned = babbler.generate(prompt, prune_every=4, prune_keep=0.5, **options)
    kept = set(range(16))
    for step, size in ((4, 8), (8, 4), (12, 2)):
        order = sorted(kept, key=lambda i: -free.candidates[i].scores[step - 1])
        for i in order[size:]:
            assert (pruned.candidates[i].finish_reason, len(pruned.candidates[i].tokens)) == ("pruned", step)
        kept = set(order[:size])
    # What is left is as it would have been without pruning.
    for i in range(16):
        length = len(pruned.candidates[i].tokens)
        assert pruned.candidates[i].tokens.tolist() == free.candidates[i].tokens[:length].tolist()
    assert pruned.best_index in kept
    assert pruned.computed_tokens == 16 * 4 + 8 * 4 + 4 * 4


def test_one_file_and_nothing_of_ours(countdown, puzzler):
    """`generate.onnx` in plain ONNX Runtime; two prompts of different lengths give what each gives alone."""
    session = onnxruntime.InferenceSession(countdown / "onnx/generate.onnx", providers=["CPUExecutionProvider"])
    texts = [PUZZLE, "4,9,13>23:"]
    ids = [[3, 1000, 7, 1000, 12, 1000, 25, 1001, 98, 1002], [1010, 1010, 4, 1000, 9, 1000, 13, 1001, 23, 1002]]
    scalars = {"num_candidates": 5, "max_new_tokens": 30, "top_k": 0, "seed": 9, "aggregation": 0, "step_token": -1}
    feeds = {name: np.array(value, np.int64) for name, value in {**scalars, "prune_every": 0}.items()}
    feeds |= {name: np.array(1, np.float32) for name in ("temperature", "top_p", "prune_keep")}
    feeds |= {"input_ids": np.array(ids), "stop_tokens": np.array([1009])}
    feeds["attention_mask"] = np.array([[1] * 10, [0, 0] + [1] * 8])
    names = ["sequences", "lengths", "candidate_scores", "best_index", "best_sequence"]
    rows, lengths, scores, best, winners = session.run(names, feeds)
    for b, text in enumerate(texts):
        alone = puzzler.generate(text, n=5, max_new_tokens=30, seed=9)
        assert [rows[n, b, : lengths[n, b]].tolist() for n in range(5)] == sequences(alone)
        assert within(scores[:, b], [c.score for c in alone.candidates], RUNTIME)
        assert best[b] == alone.best_index
        assert winners[b, : len(alone.best.tokens)].tolist() == alone.best.tokens.tolist()


def test_best_of_16_solves_more_than_one_sample(exported_countdown):
    """As the demonstration of the export counted."""
    right = json.loads((exported_countdown / "printed.json").read_text())["demonstration"]["right"]
    assert right["selected"] >= right["first"] + 20
    assert right["first"] <= right["selected"] <= right["any"]


def test_progress_cancellation_and_deadline(puzzler, monkeypatch):
    seen = []
    result = puzzler.generate(PUZZLE, n=4, seed=2, on_progress=seen.append)
    assert [max(len(c.tokens) for c in grown.candidates) for grown in seen] == list(range(1, len(seen) + 1))
    assert seen[-1] is result
    assert seen[0].candidates[0].finish_reason is None
    steps = puzzler.stream(PUZZLE, n=4, seed=2)
    assert len(next(steps).candidates[0].tokens) == 1
    steps.close()
    now = iter([0.0, *[0.5] * 4, *[2.0] * 99])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    cut = puzzler.generate(PUZZLE, n=4, seed=2, deadline=1.0)
    assert {(c.finish_reason, len(c.tokens)) for c in cut.candidates} == {("deadline", 5)}
    assert cut.best_index == seen[4].best_index


def test_length_and_stop(puzzler):
    result = puzzler.generate(PUZZLE, n=3, max_new_tokens=4)
    assert {(c.finish_reason, len(c.tokens)) for c in result.candidates} == {("length", 4)}
    result = puzzler.generate(PUZZLE, n=3, stop=[";", "="])
    assert {c.finish_reason for c in result.candidates} == {"stop"}
    # The text ends before the stop text; the tokens hold it, with its score.
    assert not any(set(c.text) & set(";=") for c in result.candidates)
    assert {decode([int(c.tokens[-1])]) for c in result.candidates} <= {";", "="}
    endless = puzzler.generate(PUZZLE, n=2, stop=[], max_new_tokens=30)
    assert {(c.finish_reason, len(c.tokens)) for c in endless.candidates} == {("length", 30)}


BAD_OPTIONS = [
    ({"n": 0}, "n: expected a whole number of at least 1; got 0"),
    ({"n": 5000}, "5000 candidates: this artifact takes at most 4096"),
    ({"n": 2.0}, "n: expected a whole number"),
    ({"max_new_tokens": 60}, "at most 64 together"),
    ({"temperature": -0.1}, "temperature: expected a number of at least 0"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": "hot"}, "temperature: expected a number"),
    ({"temperature": float("inf")}, "temperature: .* got inf"),
    ({"temperature": 1e39}, r"temperature: .* at most 3.4e38; got 1e\+39"),
    ({"temperature": 10**400}, "temperature: .* at most 3.4e38; got 1000"),
    ({"temperature": 10**9999}, "temperature: .* got a number of thousands of digits"),
    ({"temperature": 1j}, "temperature: expected a number"),
    ({"temperature": True}, "temperature: expected a number"),
    ({"top_p": 0.0}, "top_p: expected a number above 0 and at most 1"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": float("nan")}, "top_p: .* got nan"),
    ({"top_p": "0.5"}, "top_p: .* got '0.5'"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 2**63}, r"top_k: expected a whole number of at least 0 and below 2\^63"),
    ({"seed": 2**63}, r"seed: expected a whole number of at least -9223372036854775808 and below 2\^63"),
    ({"seed": -(2**63) - 1}, "seed: expected a whole number of at least -9223372036854775808; got -92"),
    ({"seed": 10**9999}, "seed: .* got a number of thousands of digits"),
    ({"n": 2**63}, r"n: expected a whole number of at least 1 and below 2\^63"),
    ({"n": 2**62}, "candidates: this artifact takes at most 4096"),
    ({"max_new_tokens": 2**62}, "at most 64 together"),
    ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number of at least 1"),
    ({"stop": [""]}, "stop: expected texts of at least one character; got an empty one"),
    ({"stop": ["^"]}, r"stop: the vocabulary has no token for '\^'"),
    ({"stop": ";"}, "stop: expected a list"),
    ({"stop": [1012]}, "stop: token id 1012 is outside the vocabulary"),
    ({"aggregation": "median"}, "aggregation: expected one of"),
    ({"prune_keep": 0}, "prune_keep"),
    ({"deadline": 0}, "deadline: expected seconds above 0; got 0"),
    ({"temprature": 1}, "unknown option 'temprature' of generate; did you mean 'temperature'"),
]


@pytest.mark.parametrize("verb", ["generate", "stream"])
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[message[:40] for _, message in BAD_OPTIONS])
def test_invalid_options_are_refused(puzzler, options, message, verb):
    with pytest.raises(InputError, match=message):
        getattr(puzzler, verb)(PUZZLE, **options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "prompt: it has no tokens"), ("x", "no token for 'x'"), ([], "no tokens")],
    ids=["empty text", "text without token", "no ids"],
)
def test_a_prompt_without_tokens_is_refused(puzzler, prompt, message):
    with pytest.raises(InputError, match=message):
        puzzler.generate(prompt)


def test_what_an_artifact_lacks_is_refused(babbler, small):
    with pytest.raises(InputError, match="no tokenizer"):
        babbler.generate([1], stop=[";"])
    with pytest.raises(ArtifactError, match="has no graph 'generate'"):
        bonnx.load(small).generate(np.zeros((3, 12), np.float32))


@pytest.mark.parametrize("options", [{}, {"prune_every": 1}], ids=["plain", "pruned"])
def test_a_scorer_that_gives_nan_has_no_winner(tiny, options):
    graph = onnx.load(str(tiny / "onnx/generate.onnx"))
    bias = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("dense2.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([np.nan], np.float32), bias.name))
    engine = open_engine(tiny)
    model = bonnx.Model(engine)
    engine.session("generate").inference = onnxruntime.InferenceSession(graph.SerializeToString())
    with pytest.raises(bonnx.NoWinnerError, match="every score is NaN"):
        model.generate([1, 2], n=3, max_new_tokens=3, **options)


FEW = {"n": 3, "max_new_tokens": 5}


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-38},
        {"temperature": 1e-46},
        {"temperature": 9e-6},
        {"temperature": -0.0},
        {"top_p": 1e-46},
        {"top_p": 1e-38},
        {"top_k": 1, "temperature": 1e30},
    ],
    ids=str,
)
def test_extremes_of_sampling_take_the_most_likely_token(babbler, extreme):
    likely = sequences(babbler.generate([1, 2], temperature=0, **FEW))
    assert sequences(babbler.generate([1, 2], **extreme, **FEW)) == likely
    *_, last = babbler.stream([1, 2], **extreme, **FEW)
    assert sequences(last) == likely


def test_a_top_p_of_nearly_1_is_1_and_a_huge_temperature_prefers_no_token(babbler):
    plain = sequences(babbler.generate([1, 2], top_p=1.0, **FEW))
    assert sequences(babbler.generate([1, 2], top_p=1 - 1e-12, **FEW)) == plain
    flat = babbler.generate([1, 2], n=30, max_new_tokens=40, temperature=1e30)
    assert len({token for row in sequences(flat) for token in row}) > 120


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)], ids=["largest", "smallest"])
def test_seeds_have_64_bits(babbler, seed):
    assert sequences(babbler.generate([1, 2], seed=seed, **FEW)) != sequences(babbler.generate([1, 2], **FEW))


@pytest.fixture(scope="module", params=[np.nan, np.inf], ids=["NaN", "infinity"])
def broken(tiny, request):
    """A model whose logits hold such a number."""
    graph = onnx.load(str(tiny / "onnx/generate.onnx"))
    (head,) = (tensor for tensor in graph.graph.initializer if list(tensor.dims) in ([16, 130], [130, 16]))
    weight = onnx.numpy_helper.to_array(head).copy()
    weight[:, 7] = request.param
    head.CopyFrom(onnx.numpy_helper.from_array(weight, head.name))
    engine = open_engine(tiny)
    engine.session("generate").inference = onnxruntime.InferenceSession(graph.SerializeToString())
    return bonnx.Model(engine)


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"prune_every": 1}], ids=str)
def test_logits_that_are_no_distribution_have_no_winner(broken, options):
    with pytest.raises(bonnx.NoWinnerError, match="every score is NaN"):
        broken.generate([1, 2], n=3, max_new_tokens=3, **options)


def test_a_token_drawn_from_no_distribution_makes_a_candidate_that_cannot_win():
    growing = Growing(check_options({"n": 2}, Stops(), "last", 3), None)
    growing.add(np.arange(2), np.array([4, 5]), np.array([0.3, 0.9], np.float32), np.array([-1.0, np.nan], np.float32))
    assert growing.select()[1] == 0
    assert np.isnan(growing.select()[0]).tolist() == [False, True]


def test_recorded_case_of_generate_is_verified(tiny):
    _, checks = bonnx.verify(tiny)
    assert "generate/1" in {check.case for check in checks}
    assert json.loads((tiny / "manifest.json").read_text())["graphs"].keys() == {
        *("score", "rank", "rank_prefill", "rank_cached"),
        *("generate", "prefill", "decode"),
    }


def test_a_fake_model_generates_by_the_same_rules():
    fake = bonnx.FakeModel(lambda prompt, candidate: float(candidate), lambda prompt, number: str(number * 3 % 7))
    seen = []
    result = fake.generate("2+2=", n=6, seed=1, on_progress=seen.append)
    assert [candidate.text for candidate in result.candidates] == ["0", "3", "6", "2", "5", "1"]
    assert (result.best.text, result.best_index, result.best.score, result.computed_tokens) == ("6", 2, 6.0, 6)
    assert seen == [result]
    assert [part.best_index for part in fake.stream("2+2=", n=6)] == [2]
    with pytest.raises(InputError, match="unknown option 'nn' of generate; did you mean 'n'"):
        fake.generate("2+2=", nn=2)
    with pytest.raises(InputError, match="pass complete="):
        bonnx.FakeModel(lambda prompt, candidate: 0.0).generate("2+2=")

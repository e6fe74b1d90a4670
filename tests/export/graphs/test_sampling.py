"""The random generator and the draw, as graphs of their own: against Python's integers, PyTorch, and their laws."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from bonnx.export.graphs.builder import Builder, finish, name_value
from bonnx.export.graphs.host import host_zeros, to_device_as_floats
from bonnx.export.graphs.prompt_options import draw_options, host_per_prompt, option
from bonnx.export.graphs.sampling import FUNCTIONS, draw_token, prompt_hash, prompt_stream, random_uniform
from bonnx.export.verify.draws import uniform
from tests.tolerance import RUNTIME, within

INT, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
ROWS = ["num_candidates", "batch"]


def finished(inputs, outputs, builder):
    graph = ir.Graph(inputs, outputs, nodes=builder.nodes, initializers=builder.initializers, name="test")
    model = ir.to_proto(finish(graph, FUNCTIONS, 18))
    onnx.checker.check_model(model, full_check=True)
    return model


def generator():
    b = Builder("generator")
    inputs = [ir.val("ids", INT, ["batch", "length"]), ir.val("mask", INT, ["batch", "length"])]
    inputs += [option("seed"), ir.val("step", INT, []), ir.val("candidates", INT, ROWS)]
    ids, mask, seed, step, candidates = inputs
    hashed = b.call(prompt_hash, ids, mask, b.int(0))
    stream = b.call(prompt_stream, hashed, host_per_prompt(b, seed, host_zeros(b, b.Shape(ids, start=0, end=1))))
    drawn = b.call(random_uniform, stream, step, candidates)
    return finished(inputs, [name_value(drawn, "uniform", FLOAT, ROWS)], b)


def draw():
    b = Builder("draw")
    inputs = [ir.val("logits", FLOAT, [*ROWS, "vocabulary"]), ir.val("uniform", FLOAT, ROWS)]
    inputs += [option(name) for name in ("temperature", "top_k", "top_p")]
    batch = b.Shape(inputs[1], start=1, end=2)
    rules = draw_options(b, inputs[2:], host_zeros(b, batch))
    top_k, heat, share = to_device_as_floats(b, 0, [(rules.top_k, batch)], [(rules.heat, batch), (rules.share, batch)])
    columns = (b.Unsqueeze(value, b.ints(1)) for value in (heat, top_k, share))
    tokens, log_probs = b.call(draw_token, *inputs[:2], b.Shape(inputs[0], start=2), *columns, *rules[3:])
    outputs = [name_value(tokens, "tokens", INT, ROWS), name_value(log_probs, "log_probs", FLOAT, ROWS)]
    return finished(inputs, outputs, b)


def session(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


GENERATOR, DRAW = generator(), draw()
GENERATOR_SESSION, DRAW_SESSION = session(GENERATOR), session(DRAW)


def uniforms(prompts, mask, seed, step, count):
    candidates = np.tile(np.arange(count)[:, None], (1, len(prompts)))
    feeds = {"ids": prompts, "mask": mask, "seed": np.array(seed), "step": np.array(step), "candidates": candidates}
    return GENERATOR_SESSION.run(None, feeds)[0], feeds


def drawn(logits, points, temperature=1.0, top_k=0, top_p=1.0):
    feeds = {
        "logits": np.asarray(logits, np.float32),
        "uniform": np.asarray(points, np.float32),
        "temperature": np.array(temperature, np.float32),
        "top_k": np.array(top_k),
        "top_p": np.array(top_p, np.float32),
    }
    return DRAW_SESSION.run(None, feeds)


@settings(max_examples=60)
@given(
    prompt=st.lists(st.integers(0, 200_000), min_size=1, max_size=9),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 10_000),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_generator_is_pythons_integers(prompt, seed, step, padding):
    ids = np.pad(np.array([prompt]), ((0, 0), padding), constant_values=5)
    mask = np.pad(np.ones((1, len(prompt)), np.int64), ((0, 0), padding))
    drawn, feeds = uniforms(ids, mask, seed, step, 5)
    expected = [[uniform(seed, np.array(prompt), step, n)] for n in range(5)]
    assert np.array_equal(drawn, np.array(expected, np.float32))
    assert np.array_equal(ReferenceEvaluator(GENERATOR).run(None, feeds)[0], drawn)


def test_uniforms_are_uniform_and_unrelated(rng):
    """Kolmogorov-Smirnov and correlations at about six standard deviations."""
    prompts, seed = rng.integers(0, 1000, (4, 7)), int(rng.integers(2**62))
    mask = np.ones_like(prompts)
    drawn = np.stack([uniforms(prompts, mask, seed, step, 256)[0] for step in range(64)])
    flat = np.sort(drawn.ravel())
    places = np.arange(len(flat)) / len(flat)
    assert np.abs(flat - places).max() < 3.0 / math.sqrt(len(flat))
    assert flat[0] >= 0
    assert flat[-1] < 1
    other = np.stack([uniforms(prompts, mask, seed + 1, step, 256)[0] for step in range(64)])
    pairs = [(drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1]), (drawn[..., 1:], drawn[..., :-1]), (drawn, other)]
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 6 / math.sqrt(a.size)


def chi_square_deviates(counts, expected):
    """How many standard deviations the chi-square is above its mean (Wilson and Hilferty, 1931)."""
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    share = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - share)) / math.sqrt(share)


@pytest.mark.parametrize("vocabulary", [12, 300])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_are_the_softmax(vocabulary, temperature, rng):
    prompts, count = rng.integers(0, 1000, (1, 5)), 20_000
    points, _ = uniforms(prompts, np.ones_like(prompts), int(rng.integers(2**62)), 0, count)
    logits = rng.standard_normal(vocabulary)
    tokens, log_probs = drawn(np.broadcast_to(logits, (count, 1, vocabulary)), points, temperature)
    expected = torch.tensor(logits / temperature).softmax(0).numpy() * count
    assert chi_square_deviates(np.bincount(tokens[:, 0], minlength=vocabulary), expected) < 6
    assert within(log_probs[:, 0], torch.tensor(logits).log_softmax(0).numpy()[tokens[:, 0]], RUNTIME)


def test_supports_of_top_k_and_top_p_are_exact(rng):
    count, vocabulary = 20_000, 40
    # Every token's share is more than one step of the points, so each that can be drawn is.
    logits = rng.uniform(-2, 2, vocabulary)
    points = (np.arange(count) / count)[:, None]
    rows = np.broadcast_to(logits, (count, 1, vocabulary))
    order, likely = np.argsort(-logits), np.sort(torch.tensor(logits).softmax(0).numpy())[::-1]
    for k in (1, 3, 17, 40, 1000):
        tokens, _ = drawn(rows, points, top_k=k)
        assert set(tokens[:, 0]) == set(order[:k].tolist())
    for p in (0.05, 0.5, 0.9, 0.99):
        size = int((np.cumsum(likely) - likely < p).sum())
        tokens, _ = drawn(rows, points, top_p=p)
        assert set(tokens[:, 0]) == set(order[:size].tolist())
        # transformers' rule for both: the k best are taken anew, and the nucleus is theirs.
        best = likely[:7] / likely[:7].sum()
        size = int((np.cumsum(best) - best < p).sum())
        assert set(drawn(rows, points, top_k=7, top_p=p)[0][:, 0]) == set(order[:size].tolist())


@settings(max_examples=80)
@given(data=st.data())
def test_draws_equal_pytorchs(data):
    """The same uniforms through `torch.cumsum` and `torch.searchsorted`, where they are not at an edge."""
    vocabulary, seed = data.draw(st.sampled_from([1, 2, 5, 127, 128, 129, 1000])), data.draw(st.integers(0, 2**32))
    temperature = data.draw(st.sampled_from([0.0, 0.1, 1.0, 3.0]))
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((6, 2, vocabulary)) * 5).astype(np.float32)
    points = (rng.integers(0, 2**23, (6, 2)) / 2**23).astype(np.float32)
    tokens, _ = drawn(logits, points, temperature)
    double = torch.from_numpy(logits).double()
    if temperature == 0:
        assert np.array_equal(tokens, double.argmax(-1).numpy())
        return
    sums = (double / np.float32(temperature).item()).softmax(-1).cumsum(-1)
    point = torch.from_numpy(points).double()[..., None]
    expected = torch.searchsorted(sums, point * sums[..., -1:], right=True)[..., 0]
    close = ((sums - point).abs().amin(-1) < 1e-5).numpy()
    assert (close | (tokens == expected.numpy())).all()


def test_the_largest_uniform_and_impossible_tokens(rng):
    """No draw falls on a token of probability 0, wherever the uniform lies."""
    logits = np.full((2, 1, 300), -np.inf, np.float32)
    logits[..., 7], logits[..., 150] = 0.0, 0.1
    tokens, _ = drawn(logits, [[0.0], [1 - 2**-23]])
    assert tokens.ravel().tolist() == [7, 150]
    for _ in range(200):
        logits = np.where(rng.random((64, 1, 257)) < 0.5, -np.inf, rng.standard_normal((64, 1, 257)) * 8)
        logits[..., 0] = 0.0
        points = rng.choice([0.0, 2**-23, 1 - 2**-23], (64, 1))
        for options in ({}, {"top_p": 0.999}, {"top_k": 300}):
            tokens, log_probs = drawn(logits, points, **options)
            assert np.isfinite(log_probs).all()


# What a program may feed, and the greedy, the filtered or the flat draw that it comes near to.
GREEDY = [0.0, -0.0, 1e-45, 1e-38, 1e-10, 9.9e-6, -1.0, -math.inf, math.nan]
STRICTEST = [0.0, 1e-46, 1e-45, 1e-38, 1e-30, -1.0, -math.inf, math.nan]
MOST = 2**63 - 1


@pytest.mark.parametrize("engine", [DRAW_SESSION, ReferenceEvaluator(DRAW)])
def test_extreme_options_are_what_they_come_near_to(engine, rng):
    # The reference evaluator gathers from at most 64, and its `LogSoftmax` is -inf where `Softmax` is 0.
    scales = [0.01, 5, 1e6] if engine is DRAW_SESSION else [0.01, 5]
    logits = (rng.standard_normal((9, 2, 40)) * rng.choice(scales)).astype(np.float32)
    points = (rng.integers(0, 2**23, (9, 2)) / 2**23).astype(np.float32)
    likely = torch.from_numpy(logits).double().argmax(-1).numpy()

    def run(temperature, top_k, top_p):
        feeds = {"temperature": temperature, "top_p": top_p}
        feeds = {name: np.array(value, np.float32) for name, value in feeds.items()}
        with np.errstate(all="ignore"):
            return engine.run(None, {"logits": logits, "uniform": points, "top_k": np.array(top_k), **feeds})[0]

    for temperature in GREEDY:
        for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.9), (MOST, 1e-46)):
            assert np.array_equal(run(temperature, top_k, top_p), likely), (temperature, top_k, top_p)
    for top_p in STRICTEST:
        for top_k in (0, 3, -5, MOST):
            assert np.array_equal(run(1.0, top_k, top_p), likely), (top_k, top_p)
    plain, all_of_them = run(1.0, 0, 1.0), run(1.0, 40, 1.0)
    for top_p in (1.0, 1 - 1e-12, 1.5, math.inf):
        for top_k in (0, -1, -(2**63)):
            assert np.array_equal(run(1.0, top_k, top_p), plain), (top_k, top_p)
        for top_k in (41, 2**31, MOST):
            assert np.array_equal(run(1.0, top_k, top_p), all_of_them), (top_k, top_p)
    for temperature in (1e30, 3e38, math.inf):
        assert np.array_equal(run(temperature, 1, 1.0), likely)
        # Every token has the same share, within what 1e6 divided by 1e30 leaves.
        assert np.array_equal(run(temperature, 0, 1.0), np.floor(points * 40)), temperature


@settings(max_examples=150)
@given(data=st.data())
def test_prompts_draw_together_what_they_draw_alone(data):
    """Bit for bit: options, seeds and the numbers of tokens that are kept differ from prompt to prompt."""
    batch, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 2**32))
    vocabulary, count = data.draw(st.sampled_from([1, 7, 130, 1000])), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((count, batch, vocabulary)) * rng.choice([0.1, 3, 20])).astype(np.float32)
    points = (rng.integers(0, 2**23, (count, batch)) / 2**23).astype(np.float32)
    temperature = rng.choice([*GREEDY, 1e-5, 0.3, 1, 1, 1, 4, math.inf], batch)
    top_k, top_p = rng.choice([-4, 0, 0, 1, 3, 50, MOST], batch), rng.choice([1e-46, 0.3, 0.95, 1, 1, 1.5], batch)
    tokens, log_probs = drawn(logits, points, temperature, top_k, top_p)
    for b in range(batch):
        alone = slice(b, b + 1)
        own = drawn(logits[:, alone], points[:, alone], temperature[b], top_k[b], top_p[b])
        assert np.array_equal(tokens[:, alone], own[0])
        assert np.array_equal(log_probs[:, alone], own[1])
    prompts, mask = rng.integers(0, 1000, (batch, 5)), np.ones((batch, 5), np.int64)
    seeds, step = rng.integers(-(2**63), 2**63 - 1, batch), int(rng.integers(100))
    together, _ = uniforms(prompts, mask, seeds, step, count)
    for b in range(batch):
        own = uniforms(prompts[b : b + 1], mask[:1], seeds[b], step, count)[0]
        assert np.array_equal(together[:, b : b + 1], own)


@pytest.mark.parametrize("batch", [1, 3])
def test_as_many_options_as_prompts_are_expected(batch, rng):
    logits, points = rng.standard_normal((2, batch, 9)), rng.random((2, batch))
    one = drawn(logits, points, top_k=2)[0]
    assert np.array_equal(drawn(logits, points, top_k=[2])[0], one)
    assert np.array_equal(drawn(logits, points, top_k=[2] * batch)[0], one)
    with pytest.raises(Exception, match=r"Cannot split|broadcast an axis"):
        drawn(logits, points, top_k=[2, 2])


@pytest.mark.parametrize("temperature", [1e-5, 3e-5, 1e-3])
def test_the_smallest_temperatures_that_are_not_greedy_are_float64s(temperature, rng):
    """Gaps of the temperature's own size: a draw that is neither greedy nor flat."""
    logits = (rng.standard_normal((500, 1, 40)) * temperature).astype(np.float32)
    points = rng.random((500, 1)).astype(np.float32)
    tokens, _ = drawn(logits, points, temperature)
    double = torch.from_numpy(logits).double()
    # `LogSoftmax` rounds logits of about 4 to 2.4e-7 and no closer; a temperature makes that a factor of a share.
    rounding = 4 * 2.4e-7 / temperature
    sums = (double / np.float32(temperature).item()).softmax(-1).cumsum(-1).numpy()
    place = np.arange(500)
    low = np.where(tokens[:, 0] > 0, sums[place, 0, tokens[:, 0] - 1], 0)
    assert (points[:, 0] >= low - rounding).all()
    assert (points[:, 0] <= sums[place, 0, tokens[:, 0]] + rounding).all()
    assert len(set((tokens[:, 0] == logits[:, 0].argmax(-1)).tolist())) == 2


@pytest.mark.parametrize("engine", [DRAW_SESSION, ReferenceEvaluator(DRAW)])
def test_logits_that_are_no_distribution_are_told_by_their_log_probability(engine):
    logits = np.zeros((6, 1, 9), np.float32)
    logits[0, 0, 5], logits[1, 0, 7], logits[2], logits[3], logits[4, 0, 2:5] = (
        math.inf,
        math.nan,
        -math.inf,
        math.nan,
        math.inf,
    )
    # This one is a distribution, in which a token is impossible.
    logits[5, 0, 0] = -math.inf
    points = np.array([[0.1], [0.9], [0.0], [0.5], [0.7], [0.0]], np.float32)
    for temperature in (0.0, 1.0, 1e30, math.inf):
        for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.9), (3, 1e-46)):
            scalars = {"temperature": np.array(temperature, np.float32), "top_p": np.array(top_p, np.float32)}
            feeds = {"logits": logits, "uniform": points, "top_k": np.array(top_k), **scalars}
            with np.errstate(all="ignore"):
                tokens, log_probs = engine.run(None, feeds)
            assert ((tokens >= 0) & (tokens < 9)).all()
            assert np.isnan(log_probs[:5]).all()
            assert tokens[5] > 0
            assert within(log_probs[5], [math.log(1 / 8)], RUNTIME)

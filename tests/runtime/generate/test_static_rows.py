"""Generations in static caches, as CUDA graphs need them, against each by itself in one run of `generate`."""

import gc
import threading

import numpy as np
import pytest
import torch

from bonnx.errors import ExportError
from bonnx.export.artifact import export_model
from bonnx.models import build
from bonnx.models.config import LanguageModelConfig, NetworkConfig
from bonnx.models.network import LanguageModel
from bonnx.runtime.engine import fixed_run
from bonnx.runtime.engine.engine import open_engine
from bonnx.runtime.engine.fixed_run import FixedRun, FixedRuns
from bonnx.runtime.generate.decoding import decode_all, runs_static
from bonnx.runtime.generate.request import read_request
from bonnx.runtime.generate.static_rows import draws_plainly
from tests.command_line import run
from tests.runtime.generate.test_continuous import check_as_alone, draw_request, play

SIZES = {"embed_dim": 16, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "scorer_hidden": 8}
# Of a run.
SMALLEST = {"rows": 1, "slots": 64, "batch": 1, "width": 1, "prompt_length": 128, "prompt_length + 1": 129}


@pytest.fixture(
    scope="module",
    params=[{"sliding_window": 5}, {"scorer_kind": "none"}, {"precision": "fp16", "qk_norm": True}],
    ids=["sliding window", "no scorer", "fp16"],
)
def small_engine(request, tmp_path_factory):
    """A random model over 130 tokens, used with its static cache."""
    torch.manual_seed(3)
    options = {"precision": "fp32", **request.param}
    precision, folder = options.pop("precision"), tmp_path_factory.mktemp("static") / "artifact"
    model = LanguageModel(LanguageModelConfig(network=NetworkConfig(**SIZES, **options), vocab_size=130)).eval()
    rules = {"verification": "quick", "min_agreement": 0.0, "precision": precision, "cuda_graph": True}
    export_model(model, folder, name="small", **rules)
    engine = open_engine(folder)
    engine.static_cache = True
    return engine


def plain_request(engine, rng):
    """One whose tokens are drawn from all, or the most likely."""
    while not draws_plainly((request := draw_request(engine, rng)).options):
        pass
    return request


def small_request(engine, rng):
    """Prompts of up to two steps of the slots' width, and completions that need more slots now and then."""
    prompt = rng.integers(0, 130, int(rng.choice([1, 7, 30, 140])))
    options = {"n": int(rng.choice([1, 2, 3, 9])), "seed": int(rng.integers(2**40))}
    options |= {"temperature": float(rng.choice([0, 0.8, 1.5])), "max_new_tokens": int(rng.choice([1, 5, 20, 70]))}
    if rng.random() < 0.3:
        options |= {"prune_every": int(rng.integers(2, 7)), "prune_keep": 0.5}
    if engine.manifest.has_scorer and rng.random() < 0.3:
        options["stop"] = rng.integers(0, 130, 5).tolist()
    return read_request(engine, prompt, options)


@pytest.mark.parametrize("company", range(4))
def test_each_gets_what_it_gets_alone(static_engine, rng, company):
    requests = [plain_request(static_engine, rng) for _ in range(25)]
    for request, growing in play(static_engine, requests, rng):
        check_as_alone(static_engine, request, growing)


def test_every_kind_of_network(small_engine, rng):
    for request, growing in play(small_engine, [small_request(small_engine, rng) for _ in range(20)], rng):
        check_as_alone(small_engine, request, growing)


@pytest.mark.parametrize("fails", ["the run", "the move"])
def test_a_run_that_fails_changes_nothing(static_engine, rng, monkeypatch, fails):
    owner, name = (FixedRun, "__call__") if fails == "the run" else (type(static_engine.session("decode")), "into")
    works, failures = getattr(owner, name), []

    def step(batch):
        def fail(*arguments):
            works(*arguments)
            failures.append(batch)
            raise MemoryError

        if rng.random() < 0.3:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, fail)
                try:
                    return batch.step()
                except MemoryError:
                    pass
        return batch.step()

    # Of many candidates, of which some are dropped early, so that rows move.
    options = {"temperature": 1.0, "prune_every": 3, "prune_keep": 0.5}
    requests = [
        read_request(static_engine, "3,7,20,24>1:", {"n": int(n), "seed": i, **options})
        for i, n in enumerate(rng.integers(1, 17, 12))
    ]
    for request, growing in play(static_engine, requests, rng, step):
        check_as_alone(static_engine, request, growing)
    assert failures


def generate(engine, request):
    *_, growing = decode_all(engine, request.prompt, request.options, engine.manifest.scoring.step_token, None)
    return growing


def test_sizes_that_were_used_before_are_used_again(static_engine, rng, monkeypatch):
    made, make = [], FixedRun.__init__
    monkeypatch.setattr(FixedRun, "__init__", lambda self, *rest: (made.append(rest[1]), make(self, *rest))[1])
    session = static_engine.session("decode_static")
    monkeypatch.setattr(session, "fixed_runs", FixedRuns(session))
    for seed in range(5):
        request = read_request(static_engine, "3,7,20,24>1:", {"n": 16, "seed": seed, "max_new_tokens": 12})
        check_as_alone(static_engine, request, generate(static_engine, request))
    assert 0 < len(made) <= 5
    assert len({tuple(sizes.items()) for sizes in made}) == len(made)


def test_the_session_is_opened_anew_after_many_captures(static_engine, rng, monkeypatch):
    monkeypatch.setattr(fixed_run, "_CAPTURES", 2)
    session = static_engine.session("decode_static")
    monkeypatch.setattr(session.fixed_runs, "_made", 2)
    opened = session.inference
    requests = [plain_request(static_engine, rng) for _ in range(12)]
    for request, growing in play(static_engine, requests, rng):
        check_as_alone(static_engine, request, growing)
    assert session.inference is not opened


def test_a_session_that_was_opened_anew_is_closed(static_engine, monkeypatch):
    monkeypatch.setattr(fixed_run, "_CAPTURES", 1)
    session = static_engine.session("decode_static")
    monkeypatch.setattr(session, "fixed_runs", FixedRuns(session))
    first, other = session.fixed_runs.take(SMALLEST), session.fixed_runs.take({**SMALLEST, "rows": 2})
    assert first.inference is not other.inference
    for taken in (first, other):
        session.fixed_runs.give_back(taken)
    # It is captured in a session that nothing else needs.
    assert session.fixed_runs.take(SMALLEST) is not first


@pytest.mark.parametrize("left", ["closed", "collected"])
def test_a_stream_that_is_left_gives_back_its_run(static_engine, monkeypatch, left):
    session = static_engine.session("decode_static")
    monkeypatch.setattr(session, "fixed_runs", FixedRuns(session))
    used = set()
    for seed in range(4):
        request = read_request(static_engine, "3,7,20,24>1:", {"n": 5, "seed": seed, "max_new_tokens": 12})
        states = decode_all(static_engine, request.prompt, request.options, None, None)
        next(states)
        if left == "closed":
            states.close()
        else:
            cycle = [states]
            cycle.append(cycle)
            del cycle, states
            gc.collect()
        (run,) = session.fixed_runs._unused
        used.add(run)
    assert len(used) == 1


@pytest.mark.parametrize("fails", ["the run", "the move"])
def test_what_fails_gives_back_its_run(static_engine, monkeypatch, fails):
    def fail(*arguments):
        raise MemoryError

    session = static_engine.session("decode_static")
    monkeypatch.setattr(session, "fixed_runs", FixedRuns(session))
    owner, name = (FixedRun, "__call__") if fails == "the run" else (type(session), "into")
    monkeypatch.setattr(owner, name, fail)
    request = read_request(static_engine, "3,7,20,24>1:", {"n": 5, "max_new_tokens": 12})
    with pytest.raises(MemoryError):
        generate(static_engine, request)
    assert len(session.fixed_runs._unused) == 1


def test_threads_share_a_session(static_engine, rng):
    requests, results = [plain_request(static_engine, rng) for _ in range(8)], {}

    def work(i):
        results[i] = generate(static_engine, requests[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, request in enumerate(requests):
        check_as_alone(static_engine, request, results[i])


@pytest.mark.parametrize(
    ("options", "static"),
    [({}, True), ({"top_k": 3}, False), ({"top_p": 0.9}, False), ({"temperature": 0, "top_k": 3}, True)],
)
def test_what_runs_in_a_static_cache(static_engine, monkeypatch, options, static):
    request = read_request(static_engine, "3,7,20,24>1:", {"n": 4, "max_new_tokens": 5, **options})
    assert runs_static(static_engine, request.options) == static
    monkeypatch.setattr(static_engine, "static_cache", False)
    grown = generate(static_engine, request)
    monkeypatch.undo()
    again = generate(static_engine, request)
    assert np.array_equal(grown.tokens, again.tokens)
    assert np.allclose(grown.scores, again.scores, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "int8"), "expected fp32, fp16 or bf16; got int8, which CUDA does not run"),
        (("--single-file", "--precision", "fp32"), "a single file has one graph and no others"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(tmp_path, options, message):
    done = run(tmp_path, "export", "-o", "artifact", "--cuda-graph", *options)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "artifact").exists()


def test_a_loop_over_experts_is_not_captured(tmp_path):
    network = NetworkConfig(**SIZES, num_experts=4, experts_per_token=2, ffn_bias=False)
    model = LanguageModel(LanguageModelConfig(network=network, vocab_size=130)).eval()
    with pytest.raises(ExportError, match="the loop over this model's experts cannot be captured"):
        export_model(model, tmp_path / "artifact", name="experts", cuda_graph=True)


def test_a_model_that_only_scores_has_no_tokens_to_draw(tmp_path):
    with pytest.raises(ExportError, match="this model has no vocabulary head"):
        export_model(build(**SIZES).eval(), tmp_path / "artifact", name="scorer", cuda_graph=True)

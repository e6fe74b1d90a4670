"""Ranking with a gated scorer: the gate reads the prompt that candidates share, or a candidate's own last turn."""

from collections import Counter

import httpx
import numpy as np
import onnx
import pytest

from bonnx import InputError
from bonnx.export.checkpoint.source import Overrides
from bonnx.runtime.artifact.describe import describe_scoring
from bonnx.runtime.rank.request import read_request
from bonnx.runtime.rank.run import rank_all
from bonnx.runtime.verification import verify
from tests.exported import exported
from tests.gated_checkpoints import HEADER, MESSAGES, make_gated
from tests.runtime.serve.servers import served
from tests.tolerance import RUNTIME, within

ANSWERS = ["It is 4.", "5", "Take 2, then add 2. It is 4."]


@pytest.fixture(scope="module")
def armo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("armo")
    case = make_gated(folder / "checkpoint", "ArmoRM", np.random.default_rng(4))
    return case, exported(folder, Overrides()), folder / "out"


def expected(case, messages, answers=ANSWERS):
    pairs = [case.reward(case.text(messages, answer)) for answer in answers]
    return np.array([score for score, _ in pairs]), np.stack([objectives for _, objectives in pairs])


def agrees(case, ranking, messages, answers=ANSWERS):
    scores, objectives = expected(case, messages, answers)
    assert within(ranking.candidate_scores, scores, RUNTIME)
    assert within(np.stack([*ranking.objectives.values()], 1), objectives, RUNTIME)


def test_the_gate_reads_the_prompt_once_for_all_candidates(armo):
    case, model, _ = armo
    for messages in (MESSAGES, MESSAGES[:1]):
        ranking = model.rank(messages, ANSWERS)
        agrees(case, ranking, messages)
        assert [*ranking.objectives][:1] == ["helpsteer-helpfulness"]
        assert len(ranking.to_dict()["objectives"]["code-readability"]) == len(ANSWERS)
    engine = model._engine
    joint = rank_all(engine, [read_request(engine, m, ANSWERS) for m in (MESSAGES, MESSAGES[:1])])
    for ranking, messages in zip(joint, (MESSAGES, MESSAGES[:1]), strict=True):
        agrees(case, ranking, messages)


def test_a_prompt_that_was_prepared_keeps_its_gate(armo):
    case, model, _ = armo
    # Each continues, cuts or repeats the one before, and the gate reads another place.
    for messages in (MESSAGES, MESSAGES[:1], MESSAGES, [*MESSAGES, {"role": "assistant", "content": "4"}, MESSAGES[2]]):
        assert model.prepare(messages)
        assert read_request(model._engine, messages, ANSWERS).continues
        agrees(case, model.rank(messages, ANSWERS), messages)


def test_a_candidate_with_a_turn_of_its_own_has_its_own_gate(armo):
    case, model, _ = armo
    turns = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    candidates = [[{"role": "assistant", "content": "It is 4."}, *turns], [{"role": "assistant", "content": "5"}]]
    ranking = model.rank(MESSAGES, candidates)
    texts = [case.tokenizer.apply_chat_template([*MESSAGES, *c], tokenize=False) for c in candidates]
    assert within(ranking.candidate_scores, [case.reward(text)[0] for text in texts], RUNTIME)
    prompt = case.text(MESSAGES[:1])
    assert not model.prepare(prompt.removesuffix(HEADER))
    assert not model.prepare("No turn.")


def test_rows_without_a_prompt_have_gates_of_their_own(armo):
    case, model, _ = armo
    rows = [[*MESSAGES, {"role": "assistant", "content": answer}] for answer in ANSWERS]
    scored = model.score([*rows, [MESSAGES[0], {"role": "assistant", "content": "4"}]])
    scores, objectives = expected(case, MESSAGES)
    alone = case.reward(case.text(MESSAGES[:1], "4"))
    assert within(scored.row_scores, [*scores, alone[0]], RUNTIME)
    assert within(np.stack([*scored.objectives.values()], 1), np.vstack([objectives, alone[1]]), RUNTIME)
    means = model.score(rows, aggregation="mean").objectives["helpsteer-verbosity"]
    assert not np.allclose(means, objectives[:, 4])


def test_a_gate_that_finds_no_turn_is_an_error(armo):
    _, model, _ = armo
    with pytest.raises(InputError, match=r"candidates\[0\]: the gate of this model reads the header .* finds none"):
        model.rank("What is 2+2?", ANSWERS)
    with pytest.raises(InputError, match=r"rows\[0\]: the gate of this model"):
        model.score(["What is 2+2?"])


def test_a_gated_artifact_is_described_and_verified(armo):
    _, model, folder = armo
    assert "19 objectives, weighted by a gate that reads the prompt" in describe_scoring(model.manifest.scoring)
    assert set(model.manifest.graphs) == {"score", "rank", "rank_prefill", "rank_cached"}
    verify(folder)


def test_the_prompts_row_needs_no_products_of_its_own(armo):
    """ONNX Runtime cannot load 8-bit weights that two products read, on processors without VNNI."""
    graph = onnx.load(armo[2] / "onnx/rank.onnx", load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    read = Counter(name for node in products for name in node.input if name in weights)
    assert len(read) > 14
    assert max(read.values()) == 1


def test_a_server_reports_objectives_and_names_what_has_no_turn(armo):
    case, model, _ = armo
    with served(model._engine) as url, httpx.Client(base_url=url, timeout=60) as client:
        answer = client.post("/v1/best-of-n", json={"prompt": MESSAGES, "candidates": ANSWERS})
        candidates = answer.raise_for_status().json()["candidates"]
        scores, objectives = expected(case, MESSAGES)
        assert within(np.array([c["score"] for c in candidates]), scores, RUNTIME)
        assert within(np.array([[*c["objectives"].values()] for c in candidates]), objectives, RUNTIME)
        for path, body in (
            ("/v1/best-of-n", {"prompt": "What?", "candidates": ANSWERS}),
            ("/v1/rerank", {"query": "What?", "documents": ANSWERS}),
            ("/pooling", {"input": ["What?"]}),
        ):
            refused = client.post(path, json=body)
            assert refused.status_code in (400, 422)
            assert "the gate of this model reads" in refused.text

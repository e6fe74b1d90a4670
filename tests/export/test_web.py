"""The graphs without bonnx: onnxruntime-web against Python.

The first run takes onnxruntime-web and a tokenizer from the npm registry, later ones from npm's own cache.
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from bonnx.models.countdown.vocabulary import END, PAD, STEP, encode
from bonnx.runtime.artifact.manifest import Scoring, TextRules
from tests.export.graphs.test_vote import vote_model
from tests.npm import PACKAGES, PAGE

SCRIPT = Path(__file__).with_name("graph.mjs")
LAST, MEAN, MIN = 0, 1, 2

DEFAULTS = {
    "num_candidates": 6,
    "max_new_tokens": 19,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "seed": 1,
    "stop_tokens": [END],
    "aggregation": LAST,
    "step_token": -1,
    "prune_every": 0,
    "prune_keep": 0.5,
}
# Of different lengths, so the second is padded.
ONE, TWO = ["3,7,12,25>98:"], ["3,7,12,25>98:", "4,9,13>43:"]
# Prompts, and options that differ from the defaults. The seeds leave no doubt about who wins and who is pruned: engines
# round differently and may order equal candidates differently. At temperature 0 all are equal, so there is only one.
CASES = {
    "temperature 1": (ONE, {}),
    "temperature 0": (ONE, {"num_candidates": 1, "temperature": 0.0}),
    "seed above 2^53": (ONE, {"seed": 2**62 + 3}),
    "negative seed": (ONE, {"seed": -5, "temperature": 0.7}),
    "top-k": (ONE, {"top_k": 3, "seed": 2}),
    "top-p": (ONE, {"top_p": 0.8, "seed": 3}),
    "top-k and top-p, two prompts": (TWO, {"top_k": 20, "top_p": 0.9, "seed": 8}),
    "pruning": (ONE, {"num_candidates": 8, "prune_every": 4, "seed": 6}),
    "two prompts": (TWO, {"seed": 30}),
    "pruning by scores of steps, two prompts": (
        TWO,
        {"temperature": 1.3, "prune_every": 7, "prune_keep": 0.6, "step_token": STEP, "aggregation": MIN, "seed": 81},
    ),
    "no stop token": (TWO, {"stop_tokens": [], "max_new_tokens": 8, "aggregation": MEAN, "seed": 40}),
    "options for each prompt": (
        TWO,
        {
            "num_candidates": [2, 7],
            "max_new_tokens": [19, 11],
            "temperature": [0.8, 1.2],
            "top_k": [0, 9],
            "top_p": [1.0, 0.9],
            "seed": [2**62 + 3, -7],
            "stop_tokens": [END, STEP + 2**33],
            "aggregation": [LAST, MIN],
            "step_token": [-1, STEP],
            "prune_every": [0, 5],
            "prune_keep": [0.5, 0.6],
        },
    ),
    "one new token": (ONE, {"num_candidates": 3, "max_new_tokens": 1, "seed": 8}),
}


def feeds(prompts, options):
    rows = [encode(prompt) for prompt in prompts]
    width = max(map(len, rows))
    values = {
        "input_ids": [[PAD] * (width - len(row)) + row for row in rows],
        "attention_mask": [[0] * (width - len(row)) + [1] * len(row) for row in rows],
        **DEFAULTS,
        **options,
    }
    floats = {"temperature", "top_p", "prune_keep"}
    return {name: np.array(value, np.float32 if name in floats else np.int64) for name, value in values.items()}


def to_plain(array):
    if array.dtype == np.int64:
        return {"type": "int64", "dims": array.shape, "data": [str(x) for x in array.flat]}
    return {"type": "float32", "dims": array.shape, "data": [float(x) for x in array.flat]}


def to_array(plain):
    kind = {"int64": int, "float32": lambda x: np.nan if x is None else x}[plain["type"]]
    return np.array([kind(x) for x in plain["data"]], plain["type"]).reshape(plain["dims"])


def in_node(artifact, graph, folder, cases):
    """The outputs of each case in onnxruntime-web, from one run of Node."""
    script, inputs, outputs = shutil.copy(SCRIPT, folder), folder / "cases.json", folder / "results.json"
    plain = [{name: to_plain(value) for name, value in case.items()} for case in cases]
    inputs.write_text(json.dumps(plain))
    done = subprocess.run(
        [shutil.which("node"), script, artifact, graph, inputs, outputs], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(outputs.read_text())
    assert f"onnxruntime-web@{results['version']}" in PACKAGES
    return [{name: to_array(value) for name, value in result.items()} for result in results["results"]]


def check_same(outputs, session, feeds):
    names = [output.name for output in session.get_outputs()]
    wanted = dict(zip(names, session.run(names, feeds), strict=True))
    assert outputs.keys() == wanted.keys()
    for name, value in wanted.items():
        assert outputs[name].dtype == value.dtype, name
        if value.dtype == np.int64:
            np.testing.assert_array_equal(outputs[name], value, name)
        else:
            np.testing.assert_allclose(outputs[name], value, rtol=0, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def web(countdown, npm_folder):
    """The outputs of every case of `generate`."""
    return dict(
        zip(CASES, in_node(countdown, "generate", npm_folder, [feeds(*c) for c in CASES.values()]), strict=True)
    )


def session_of(artifact, graph):
    return onnxruntime.InferenceSession(artifact / "onnx" / f"{graph}.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def session(countdown):
    return session_of(countdown, "generate")


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_web_generates_the_same(case, session, web):
    check_same(web[case], session, feeds(*CASES[case]))


def test_onnxruntime_web_votes_the_same(countdown, npm_folder):
    texts, answers = ["25-12=13;", "7+3=10;", "12+3=15;", "7*3=21;", "13+2=15;"], [2**62 + 1, 5, -1, 2**62 + 1, 2**62]
    rows = [[*encode(text), END] for text in texts]
    width = max(map(len, rows))
    plain = {
        "prompt_ids": [encode(ONE[0])],
        "prompt_mask": [[1] * len(encode(ONE[0]))],
        "candidate_ids": [[row + [PAD] * (width - len(row))] for row in rows],
        "candidate_mask": [[[1] * len(row) + [0] * (width - len(row))] for row in rows],
        "step_mask": [[[1]]],
        "aggregation": MEAN,
        "answer_ids": [[answer] for answer in answers],
    }
    given = {name: np.array(value, np.int64) for name, value in plain.items()}
    cases = [given | {"vote": np.array(vote)} for vote in (0, 1, 2)]
    cases[0]["answer_ids"] = np.array([[-1]])
    session = session_of(countdown, "rank")
    for outputs, case in zip(in_node(countdown, "rank", npm_folder, cases), cases, strict=True):
        check_same(outputs, session, case)


def test_onnxruntime_web_weighs_raw_scores_the_same(npm_folder, tmp_path, rng):
    """Countdown's scores are probabilities: the softmax of raw ones, in double precision, is a graph of its own."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/weights.bin").touch()
    (tmp_path / "onnx/vote.onnx").write_bytes(vote_model(23, "softmax").SerializeToString())
    scores = (10 * rng.standard_normal((9, 2)) - 20).astype(np.float32)
    given = {"candidate_scores": scores, "answer_ids": rng.integers(-1, 3, (9, 2)), "vote": np.array(1)}
    (outputs,) = in_node(tmp_path, "vote", npm_folder, [given])
    check_same(outputs, session_of(tmp_path, "vote"), given)


def test_the_page_names_every_rule_of_the_manifest():
    page = PAGE.read_text(encoding="utf-8")
    names = [f"scoring.{name}" for name in Scoring.__struct_fields__]
    names += [f"text.{name}" for name in TextRules.__struct_fields__]
    assert [name for name in names if f"`{name}`" not in page] == []

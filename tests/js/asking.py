"""Ask the npm package and Python the same, and compare what they answer."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np

import bonnx
from bonnx import InputError, NoWinnerError

SCRIPT = Path(__file__).with_name("ask.mjs")
# Codes of what is an InputError in Python.
OF_INPUT = {"input", "option", "too-large"}


def in_node(folder, script, *arguments):
    """What a script prints that lies in the folder of the packages."""
    command = [shutil.which("node"), script, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, encoding="utf-8")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def ask(folder, questions):
    """The answers of the npm package to the calls of several artifacts, from one run of Node."""
    script, given, found = shutil.copy(SCRIPT, folder), folder / "questions.json", folder / "answers.json"
    given.write_text(json.dumps(questions, default=str), encoding="utf-8")
    in_node(folder, script, given, found)
    return json.loads(found.read_text(encoding="utf-8"))


def snake(name):
    return re.sub(r"[A-Z]", lambda letter: f"_{letter[0].lower()}", name)


def of_python(options):
    """The options of a call as Python takes them."""
    values = {snake(name): value for name, value in options.items() if name != "onToken"}
    return {n: int(v["bigint"]) if isinstance(v, dict) and "bigint" in v else v for n, v in values.items()}


def numbers(values):
    """Numbers that travelled as JSON, where NaN is a text."""
    return np.array([float(value) for value in values])


def check_close(found, expected, what, factors=1):
    """Compare numbers; the relative error of a product is the sum of those of its factors."""
    wanted = np.asarray(expected, np.float64)
    np.testing.assert_allclose(numbers(found), wanted, rtol=1e-4 * factors, atol=1e-4, err_msg=what)


def check(artifact, calls, answers):
    """Compare the answers to the calls of an artifact with Python's; returns how many of them were errors."""
    model = bonnx.load(artifact, provider="cpu")
    errors = 0
    for call, answer in zip(calls, answers, strict=True):
        given, options = call["arguments"], of_python(call.get("options", {}))
        if model.manifest.kind == "network":
            given = [np.float32(given[0]), [np.float32(rows).reshape(-1, len(given[0][0])) for rows in given[1]]]
        expected, codes = _in_python(model, call["method"], given, options)
        if codes:
            assert answer.get("code") in codes, (call, answer)
            errors += 1
            continue
        assert "result" in answer, (call, answer)
        try:
            (_check_ranking if call["method"] == "rank" else _check_generation)(answer["result"], expected)
            if "states" in answer:
                _check_states(answer["states"], model.stream(*given, **options))
        except AssertionError as e:
            raise AssertionError(f"{call}: {e}") from e
    model.close()
    return errors


def _in_python(model, method, given, options):
    """The result of a call, and if it is an error the codes that say the same."""
    try:
        return getattr(model, method)(*given, **options), None
    except NoWinnerError:
        return None, {"no-winner"}
    except InputError:
        return None, OF_INPUT


def _check_order(found, expected, scores, group_scores):
    """Whether indices are in the expected order, but for those that are as good as equal: engines round differently."""
    for values in (scores, scores if group_scores is None else group_scores):
        of_found, of_expected = (np.asarray(values, np.float64)[list(indices)] for indices in (found, expected))
        np.testing.assert_allclose(of_found, of_expected, rtol=1e-4, atol=1e-7, err_msg=f"{found} for {expected}")


def _check_choice(found, expected, scores, factors=1):
    _check_order([found["bestIndex"]], [expected.best_index], scores, expected.group_scores)
    assert found["aggregation"] == expected.aggregation
    assert found["answers"] == (None if expected.answers is None else list(expected.answers))
    assert (found["groupScores"] is None) == (expected.group_scores is None)
    if expected.group_scores is not None:
        check_close(found["groupScores"], expected.group_scores, "group scores", factors)


def _check_ranking(found, expected):
    factors = max(map(len, expected.scores)) if expected.aggregation.endswith("prod") else 1
    _check_choice(found, expected, expected.candidate_scores, factors)
    _check_order(found["order"], expected.order, expected.candidate_scores, expected.group_scores)
    check_close(found["candidateScores"], expected.candidate_scores, "candidate scores", factors)
    for rows, wanted in ((found["scores"], expected.scores), (found["stepScores"], expected.step_scores)):
        assert (rows is None) == (wanted is None)
        for row, scores in zip(rows or [], wanted or [], strict=True):
            check_close(row, scores, "scores")
    assert found["cut"] == expected.cut
    assert (found["margin"] is None) == (expected.margin is None)
    if expected.margin is not None:
        check_close([found["margin"]], [expected.margin], "margin", factors)
    assert found["unreadable"] == {str(i): reason for i, reason in expected.unreadable.items()}
    assert (found["objectives"] is None) == (expected.objectives is None)
    for name, values in (expected.objectives or {}).items():
        check_close(found["objectives"][name], values, name)


def _check_generation(found, expected):
    _check_choice(found, expected, [candidate.score for candidate in expected.candidates])
    assert (found["promptTokens"], found["computedTokens"]) == (expected.prompt_tokens, expected.computed_tokens)
    _check_candidates(found["candidates"], expected.candidates)


def _check_states(found, expected):
    for state, wanted in zip(found, expected, strict=True):
        _check_order([state["bestIndex"]], [wanted.best_index], [c.score for c in wanted.candidates], None)
        _check_candidates(state["candidates"], wanted.candidates)


def _check_candidates(found, expected):
    for candidate, wanted in zip(found, expected, strict=True):
        assert candidate["tokens"] == wanted.tokens.tolist()
        assert (candidate["text"], candidate["finishReason"]) == (wanted.text, wanted.finish_reason)
        check_close([candidate["score"]], [wanted.score], "score")
        check_close(candidate["scores"], wanted.scores, "scores")
        check_close(candidate["logProbs"], wanted.log_probs, "log-probabilities")

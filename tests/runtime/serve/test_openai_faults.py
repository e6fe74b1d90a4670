"""One completion that cannot be scored, or not in time, does not cost the others their answer."""

import json
import logging
import time

import httpx
import openai
import pytest

from bonnx.models.countdown.vocabulary import encode
from bonnx.runtime.rank import run as ranking
from tests.runtime.upstream import fake

PUZZLE = "3,7,20,24>1:"
TEXTS = ["24-20=4;7-4=3;3/3=1;", "24/3=8;20-7=13;13-8=1;", "24-3=21;"]


@pytest.fixture(scope="module")
def engine(chat_engine):
    return chat_engine


def late(behaviour, seconds):
    """Answers after some seconds."""

    def behave(body):
        time.sleep(seconds)
        return behaviour(body)

    return behave


def test_scoring_that_does_not_end_in_time_does_not_lose_what_was_scored(behind, model, monkeypatch):
    run, calls = ranking.run_together, []

    def slow(engine, requests, stop=None):
        calls.append(len(requests))
        if len(calls) > 1:
            time.sleep(2.5)
        return run(engine, requests, stop)

    client, _ = behind(fake.answer(TEXTS[0], honours_n=False), late(fake.answer(TEXTS[1]), 0.7), timeout=3.0)
    expected = model.rank(PUZZLE, TEXTS[:1]).candidate_scores
    monkeypatch.setattr(ranking, "run_together", slow)
    answer = client.completions.create(model="countdown", prompt=PUZZLE, extra_body={"best_of": 2})
    assert answer.choices[0].text == TEXTS[0]
    assert answer.bonnx["scores"] == pytest.approx(expected, abs=1e-5)
    assert answer.bonnx["warnings"] == ["completions[1]: there was no time left to score it"]


def test_if_nothing_was_scored_in_time_the_request_timed_out(behind, monkeypatch):
    run = ranking.run_together
    monkeypatch.setattr(ranking, "run_together", lambda *args: (time.sleep(2), run(*args))[1])
    client, _ = behind(fake.answer(*TEXTS), timeout=1.0)
    with pytest.raises(openai.InternalServerError) as raised:
        client.completions.create(model="countdown", prompt=PUZZLE)
    assert raised.value.status_code == 504


def test_a_text_that_was_sent_is_not_taken_back(behind, monkeypatch):
    """It was streamed, and its score comes too late."""
    run = ranking.run_together
    monkeypatch.setattr(ranking, "run_together", lambda *args: (time.sleep(2), run(*args))[1])
    client, _ = behind(fake.stream(TEXTS[0]), timeout=1.0)
    stream = client.completions.create(model="countdown", prompt=PUZZLE, stream=True, extra_body={"best_of": 1})
    chunks = [*stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXTS[0]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].bonnx == {"scores": [None], "warnings": ["there was no time left to score it"]}


def test_a_completion_above_the_servers_limit_is_a_warning(behind, model):
    """40 tokens at once are enough for two of the three."""
    long = "24-20=4;7-4=3;3/3=1;" * 2
    client, _ = behind(fake.answer(TEXTS[2], long, TEXTS[0]), max_tokens=40)
    answer = client.completions.create(model="countdown", prompt=PUZZLE)
    assert answer.choices[0].text == model.rank(PUZZLE, [TEXTS[2], TEXTS[0]]).best
    (warning,) = answer.bonnx["warnings"]
    assert warning.startswith("completions[1]: 1 completions of 3")
    client, _ = behind(fake.answer(long), max_tokens=40)
    with pytest.raises(openai.BadRequestError, match="this server takes at most 40 at once"):
        client.completions.create(model="countdown", prompt=PUZZLE, extra_body={"best_of": 1})


def test_a_completion_above_the_artifacts_limit_is_a_warning(behind, model):
    long = TEXTS[0] * 6
    client, _ = behind(fake.answer(TEXTS[2], long, TEXTS[0]))
    answer = client.completions.create(model="countdown", prompt=PUZZLE)
    assert answer.choices[0].text == model.rank(PUZZLE, [TEXTS[2], TEXTS[0]]).best
    assert "this artifact takes at most 64 together" in answer.bonnx["warnings"][0]


def test_half_of_a_surrogate_pair_is_a_warning(behind):
    choices = [{"index": i, "finish_reason": "stop", "text": text} for i, text in enumerate([TEXTS[0], "24\ud83d", ""])]
    client, _ = behind(fake.page(json.dumps({"choices": choices}), kind="application/json"))
    answer = client.completions.create(model="countdown", prompt=PUZZLE)
    assert answer.choices[0].text == TEXTS[0]
    assert [warning.split(": ")[0] for warning in answer.bonnx["warnings"]] == ["completions[1]", "completions[2]"]
    assert "half of a surrogate pair" in answer.bonnx["warnings"][0]


def test_the_log_line_adds_up_what_was_scored(behind, caplog):
    """Each completion comes, and is scored, by itself."""
    client, _ = behind(*[late(fake.answer(text, honours_n=False), 0.3 * i) for i, text in enumerate(TEXTS)])
    with caplog.at_level(logging.INFO, "bonnx.serve"):
        client.completions.create(model="countdown", prompt=PUZZLE, extra_body={"best_of": 3})
        httpx.get(str(client.base_url).replace("/v1/", "/health"))
    line = next(r.notes for r in caplog.records if getattr(r, "notes", {}).get("path") == "/v1/completions")
    assert line["completions"] == 3
    assert line["rankings"] >= 2
    # The prompt of 10 tokens once for each ranking, and all completions with their ends.
    assert line["tokens"] == 10 * line["rankings"] + sum(len(encode(text)) + 1 for text in TEXTS)

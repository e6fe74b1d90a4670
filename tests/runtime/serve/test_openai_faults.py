"""One completion that cannot be scored, or not in time, does not cost the others their answer."""

import json
import logging
import threading
import time

import httpx
import openai
import pytest

from bonnx.models.countdown.vocabulary import encode
from bonnx.runtime.serve.batcher import DeadlineError
from bonnx.runtime.serve.service import Service
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


@pytest.fixture
def out_of_time(monkeypatch):
    """Lets the time of a request be over before a ranking that holds one of these texts; tells when another is done."""

    def after(*texts):
        rank, is_done = Service.rank, threading.Event()

        async def late_rank(self, request, ranked, **options):
            if {*ranked.candidates} & {*texts}:
                raise DeadlineError
            outcome = await rank(self, request, ranked, **options)
            is_done.set()
            return outcome

        monkeypatch.setattr(Service, "rank", late_rank)
        return is_done

    return after


def test_scoring_that_does_not_end_in_time_does_not_lose_what_was_scored(behind, model, out_of_time):
    expected = model.rank(PUZZLE, TEXTS[:1]).candidate_scores
    first_is_scored = out_of_time(TEXTS[1])

    def second(body):
        assert first_is_scored.wait(30)
        return fake.answer(TEXTS[1])(body)

    client, _ = behind(fake.answer(TEXTS[0], honours_n=False), second)
    answer = client.completions.create(model="countdown", prompt=PUZZLE, extra_body={"best_of": 2})
    assert answer.choices[0].text == TEXTS[0]
    assert answer.bonnx["scores"] == pytest.approx(expected, abs=1e-5)
    assert answer.bonnx["warnings"] == ["completions[1]: there was no time left to score it"]


def test_if_nothing_was_scored_in_time_the_request_timed_out(behind, out_of_time):
    out_of_time(*TEXTS)
    client, _ = behind(fake.answer(*TEXTS))
    with pytest.raises(openai.InternalServerError) as raised:
        client.completions.create(model="countdown", prompt=PUZZLE)
    assert raised.value.status_code == 504


def test_a_text_that_was_sent_is_not_taken_back(behind, out_of_time):
    """It was streamed, and its score comes too late."""
    out_of_time(*TEXTS)
    client, _ = behind(fake.stream(TEXTS[0]))
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
    # The prompt of 10 tokens for each ranking, perhaps once before them, and all completions with their ends.
    prompts = line["tokens"] - sum(len(encode(text)) + 1 for text in TEXTS)
    assert prompts in (10 * line["rankings"], 10 * line["rankings"] + 10)

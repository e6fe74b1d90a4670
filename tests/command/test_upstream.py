"""`bonnx generate --upstream`: another server samples, the artifact chooses."""

import json

import pytest

import bonnx
from bonnx.command import main
from tests.runtime.upstream import fake
from tests.runtime.upstream.fake import FakeUpstream

PUZZLE = "3,7,20,24>1:"
TEXTS = ["24-20=4;7-4=3;3/3=1;", "24/3=8;20-7=13;13-8=1;", "24-3=21;"]


def test_the_best_completion_of_an_upstream(countdown, capsys):
    with FakeUpstream(fake.stream(*TEXTS)) as upstream:
        options = ["--upstream", upstream.url, "--upstream-model", "llm", "-n", "3", "--temperature", "0.5"]
        assert main(["generate", str(countdown), PUZZLE, *options, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert main(["generate", str(countdown), PUZZLE, *options]) == 0
    shown = capsys.readouterr().out
    assert printed["best"] == bonnx.load(countdown, provider="cpu").rank(PUZZLE, TEXTS).best
    assert {completion["text"] for completion in printed["completions"]} == {*TEXTS}
    assert all(text in shown for text in TEXTS)
    body = upstream.bodies[0]
    assert (body["model"], body["n"], body["temperature"], body["prompt"]) == ("llm", 3, 0.5, PUZZLE)
    assert not {"top_k", "seed"} & body.keys()


def test_votes_methods_and_failures(countdown, capsys):
    refused = fake.error(400, "no more")
    with FakeUpstream(fake.answer(TEXTS[0], honours_n=False), fake.answer(TEXTS[0]), refused) as upstream:
        options = ["--upstream", upstream.url, "-n", "3", "--answers", "number", "--vote", "majority"]
        assert main(["generate", str(countdown), PUZZLE, *options, "--method", "adaptive", "--set", "batch=3"]) == 0
    printed = capsys.readouterr()
    assert TEXTS[0] in printed.out
    assert "one completion failed: the upstream answered 400: no more" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--upstream-model", "m"], "--upstream-model belongs to --upstream"),
        (["--upstream", "nowhere"], "expected an address such as"),
        (["--upstream", "http://x/v1", "--method", "pruned"], "'pruned' works only with an artifact that generates"),
        (["--upstream", "http://x/v1", "--policy", "p.json"], "--policy: not available with --upstream"),
        (["--upstream", "http://x/v1", "--set", "batch=3"], "unknown option 'batch' of method 'best_of_n'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together(options, message, countdown, capsys):
    assert main(["generate", str(countdown), PUZZLE, *options]) != 0
    assert message in capsys.readouterr().err

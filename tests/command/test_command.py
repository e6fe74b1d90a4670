"""The installed `bonnx` command, in a folder away from the source."""

import json
import re
import shutil

import numpy as np
import pytest

import bonnx
from bonnx.command import main
from bonnx.models.countdown.vocabulary import END, encode
from tests.command_line import run

PUZZLE = "3,7,12,25>98:"
CANDIDATES = ["12-3=9;9*7=63;63+25=88;", "25+7=32;32*3=96;96+12=98;"]


def test_export_without_arguments(exported_countdown, tmp_path):
    printed = json.loads((exported_countdown / "printed.json").read_text())
    assert printed["triton"] == ["countdown_rank", "countdown_score", "countdown_generate"]
    repository = exported_countdown / "repository"
    assert sorted(path.name for path in repository.iterdir()) == sorted(printed["triton"])
    assert max(p["max_difference"] for p in printed["parity"]) < 5e-5
    demonstration = printed["demonstration"]
    right = demonstration["right"]
    assert demonstration["puzzles"] == 100
    assert right["selected"] >= right["first"] + 15
    assert right["selected"] > right["majority"]
    assert right["selected"] <= right["any"]
    artifact = exported_countdown / "artifacts/countdown"
    assert json.loads(run(tmp_path, "verify", artifact, "--json").stdout)["ok"] is True
    assert [path.name for path in artifact.parent.iterdir()] == ["countdown"]
    assert run(tmp_path, "export", "-o", artifact).returncode == 1


def test_verify_says_what_was_changed(small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "edited")
    data = bytearray((folder / "onnx/weights.bin").read_bytes())
    data[100] ^= 1
    (folder / "onnx/weights.bin").write_bytes(data)
    done = run(tmp_path, "verify", folder, "--json")
    printed = json.loads(done.stdout)
    assert (done.returncode, printed["ok"]) == (1, False)
    assert "weights.bin" in printed["reason"]


@pytest.mark.parametrize("form", ["lines", "json", "ids", "stdin"])
def test_rank_text(countdown, tmp_path, form):
    expected = bonnx.load(countdown).rank(PUZZLE, CANDIDATES)
    path, given = tmp_path / "candidates", None
    if form == "lines":
        path.write_text("\n".join(CANDIDATES) + "\n")
    elif form == "json":
        path.write_text(json.dumps(CANDIDATES))
    elif form == "ids":
        path.write_text(json.dumps([[*encode(c), END] for c in CANDIDATES]))
    else:
        path, given = "-", "\n".join(CANDIDATES)
    done = run(tmp_path, "rank", countdown, "--prompt", PUZZLE, "--candidates", path, "--json", given=given)
    printed = json.loads(done.stdout)
    assert printed["best_index"] == expected.best_index
    assert np.allclose(printed["candidate_scores"], expected.candidate_scores, atol=1e-6)
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(printed["scores"], expected.scores, strict=True))
    if form != "ids":
        assert printed["best"] == expected.best


def test_rank_by_vote(countdown, tmp_path):
    texts = ["12-3=9;", "25-12=13;", "7+2=9;"]
    (tmp_path / "candidates").write_text("\n".join(texts))
    options = ("rank", countdown, "--prompt", PUZZLE, "--candidates", "candidates", "--vote", "majority")
    printed = json.loads(run(tmp_path, *options, "--answers", "number", "--json").stdout)
    assert printed["answers"] == ["9", "13", "9"]
    assert printed["group_scores"] == [2.0, 1.0, 2.0]
    assert printed["margin"] == 1.0
    scores = printed["candidate_scores"]
    assert printed["order"] == ([0, 2, 1] if scores[0] >= scores[2] else [2, 0, 1])
    assert printed["best_index"] == printed["order"][0]
    lines = run(tmp_path, *options, "--answers", "regex:=([0-9]+)").stdout.splitlines()
    assert [line.lstrip("* ").split()[1:] for line in lines] == [
        ["2.00000", "9", texts[0]],
        ["1.00000", "13", texts[1]],
        ["2.00000", "9", texts[2]],
    ]
    done = run(tmp_path, *options)
    assert (done.returncode, "vote='majority' needs answers" in done.stderr) == (2, True)


def test_rank_embeddings(small, tmp_path, rng):
    prompt, candidates = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 12), (3, 5, 12)))
    np.save(tmp_path / "prompt.npy", prompt)
    np.save(tmp_path / "candidates.npy", candidates)
    np.savez(tmp_path / "candidates.npz", a=candidates[0], b=candidates[1][:2])
    done = run(tmp_path, "rank", small, "--prompt", "prompt.npy", "--candidates", "candidates.npy", "--json")
    assert json.loads(done.stdout)["best_index"] == bonnx.load(small).rank(prompt, candidates).best_index
    done = run(tmp_path, "rank", small, "--prompt", "prompt.npy", "--candidates", "candidates.npz", "--json")
    assert [len(s) for s in json.loads(done.stdout)["scores"]] == [5, 2]


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "at least one candidate", "rank ARTIFACT --prompt PUZZLE --candidates empty"),
        (
            2,
            "candidates: none can be read: candidates[0]: it has no tokens",
            "rank ARTIFACT --prompt PUZZLE --candidates hole",
        ),
        (2, "cannot read nowhere", "rank ARTIFACT --prompt PUZZLE --candidates nowhere"),
        (2, "invalid choice", "verify ARTIFACT --provider tpu"),
        (2, "the following arguments are required", "rank ARTIFACT"),
        (2, "required: command", ""),
        (2, "--checkpoint needs -o/--output", "export --checkpoint ."),
        (1, "is not an artifact", "inspect ."),
        (1, "expected a folder with config.json, or an id on the hub", "export --checkpoint nowhere -o out"),
        (1, "provider='cuda' was requested", "rank ARTIFACT --prompt PUZZLE --candidates good --provider cuda"),
    ],
)
def test_wrong_usage_is_2_and_failure_is_1(code, message, arguments, countdown, tmp_path):
    for name, text in {"empty": "", "good": "1+1=2;\n", "hole": "\n^\n"}.items():
        (tmp_path / name).write_text(text)
    places = {"ARTIFACT": countdown, "PUZZLE": PUZZLE}
    done = run(tmp_path, *(places.get(argument, argument) for argument in arguments.split()))
    assert message in done.stderr
    assert done.returncode == code, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "good", "hole"]


def test_inspect_and_doctor(countdown, tmp_path):
    document = json.loads(run(tmp_path, "inspect", countdown, "--json").stdout)
    assert document["scoring"]["activation"] == "sigmoid"
    assert "onnx/rank.onnx, opset 23: prompt_ids" in run(tmp_path, "inspect", countdown).stdout
    done = run(tmp_path, "doctor", "--json")
    printed = json.loads(done.stdout)
    assert printed["ok"] is (done.returncode == 0)
    assert "CPUExecutionProvider" in printed["providers"]


def test_dry_run_writes_nothing(tmp_path):
    done = run(tmp_path, "export", "--dry-run")
    assert done.returncode == 0
    assert "would write artifacts/countdown" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("generate", {"-n": 1, "--top-k": 0, "--top-p": 1.0, "--temperature": 1.0, "--seed": 0, "--prune-keep": 0.5}),
        ("rank", {"--vote": "score", "--provider": "auto"}),
        ("batch", {"--prompt-field": "prompt", "--chunk": 256, "--ray-gpus": 0, "--vote": "score"}),
        ("serve", {"--port": 8000, "--batch-wait": 0.0, "--max-queue": 256, "--replica-gpus": 0, "--grace": 30}),
    ],
)
def test_help_shows_every_default(capsys, command, defaults):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = re.split(r"\n  (?=-)", capsys.readouterr().out)
    for option, default in defaults.items():
        text = next(" ".join(part.split()) for part in options if part.startswith(f"{option} "))
        assert f"(default: {default})" in text

"""The npm package gives what Python gives, for every kind of artifact; its own tests, its types and its page."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import bonnx
from bonnx.export.artifact import export_model
from bonnx.models import build
from bonnx.models.countdown.puzzle import draw_puzzles
from bonnx.runtime.artifact.manifest import Limits, Manifest, PairRules, Scoring, TextRules
from tests.checkpoints import ANSWERS, QUESTION, make
from tests.exported import export
from tests.folded import folded
from tests.gated_checkpoints import HEADER, make_gated
from tests.head_checkpoints import make_other
from tests.js.asking import ask, check, in_node
from tests.pages import ROOT, read_blocks
from tests.rerankers import DOCUMENTS, QUERIES, make_causal, save_description

# Pieces of which texts are made: what tokenizers, templates and answers treat in a way of their own.
PIECES = [
    *("", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\x00", "\x85", "\xa0", "\u2028", "\ufeff", "\u200b", "\x1c"),
    *("é", "e\u0301", "Å", "ﬁ", "数学", "\U0001f9ee", "\U0001f468\u200d\U0001f469", "٣", "½", "²", "ß"),
    *("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<extra_0>", "<0x0A>", "▁", "Ġ", "+", "-"),
    *("don't", "It is 4.", "12", "4", "x**2", r"\boxed{3}", "3/4", "1,000", QUESTION, *ANSWERS),
]
AGGREGATIONS = ["last", "mean", "min", "max", "prod"]
EXAMPLE = "tests/js/test_module.py runs it"


def text(dice, most=5):
    return "".join(dice.choice(PIECES) for _ in range(dice.randint(0, most)))


def messages(dice):
    turns = [{"role": "user", "content": text(dice, 3)}]
    if dice.random() < 0.3:
        turns.insert(0, {"role": "system", "content": text(dice, 2)})
    if dice.random() < 0.3:
        turns += [{"role": "assistant", "content": text(dice, 2)}, {"role": "user", "content": "Go on."}]
    if dice.random() < 0.2:
        turns[0]["content"] = [{"type": "text", "text": text(dice, 2)}, {"type": "text", "text": "b"}]
    return turns


def rank_calls(dice, count, *, steps=False, chats=0.4):
    calls = []
    for _ in range(count):
        options = {}
        if dice.random() < 0.5:
            options["aggregation"] = "step_" * (steps and dice.random() < 0.6) + dice.choice(AGGREGATIONS)
        for name in ("partial", "truncate"):
            if dice.random() < 0.2:
                options[name] = True
        if dice.random() < 0.4:
            vote, answers = (
                dice.choice(["weighted", "majority", "score"]),
                dice.choice(["number", "boxed", "regex:[0-9]"]),
            )
            options |= {"vote": vote, "answers": answers}
        prompt = messages(dice) if dice.random() < chats else text(dice) or QUESTION
        candidates = [text(dice) for _ in range(dice.randint(1, 5))]
        if "answers" not in options:
            if steps and dice.random() < 0.3:
                candidates.append([text(dice, 2) or "a" for _ in range(dice.randint(1, 3))])
            elif not isinstance(prompt, str):
                candidates.append([{"role": "assistant", "content": text(dice)}])
        calls.append({"method": "rank", "arguments": [prompt, candidates], "options": options})
    return calls


def generate_calls(dice, count, prompts, stops, *, prunes=True):
    calls = []
    for _ in range(count):
        big = {"bigint": str(dice.randint(-(2**63), 2**63 - 1))}
        options = {
            "n": dice.randint(1, 6),
            "maxNewTokens": dice.randint(1, 19),
            "seed": dice.choice([dice.randint(-99, 99), big]),
            # At 0 all candidates are equal, and rounding decides which of them is pruned.
            "temperature": dice.choice([0.6, 1.0, 1.4]),
            "topK": dice.choice([0, 0, 7]),
            "topP": dice.choice([1, 1, 0.9]),
        }
        if prunes and dice.random() < 0.4:
            options |= {"pruneEvery": dice.randint(1, 5), "pruneKeep": dice.choice([0.3, 0.5, 0.8])}
        if dice.random() < 0.3:
            options["aggregation"] = dice.choice(AGGREGATIONS)
        if dice.random() < 0.4:
            options["onToken"] = True
        if dice.random() < 0.3:
            options["stop"] = dice.choice(stops)
        if dice.random() < 0.3:
            # It passes with the first token, or never.
            options["deadline"] = dice.choice([1e-6, 1e6])
        calls.append({"method": "generate", "arguments": [dice.choice(prompts)], "options": options})
    greedy = {"n": 1, "temperature": 0, "maxNewTokens": 9, "onToken": True}
    return [*calls, {"method": "generate", "arguments": [prompts[0]], "options": greedy}]


def test_countdown(countdown, npm_folder, dice):
    prompts, stops = ["3,7,20,24>1:", "4,9,13>43:", "2,3,5>10:"], [[";"], ["=4"], [11], []]
    puzzles = [["24-20=4;7-4=3;3/3=1;", "24/3=8;20-7=13;", "24", "x", ""], ["13-9=4;", "4+9=13;13+13=26;"]]
    # Many candidates begin alike, and rounding decides which of those that are equal are pruned: not so with this seed.
    calls = generate_calls(dice, 12, prompts, stops, prunes=False)
    pruned = {"n": 8, "pruneEvery": 4, "seed": 6, "onToken": True}
    calls.append({"method": "generate", "arguments": [prompts[0]], "options": pruned})
    for _ in range(12):
        aggregation = "step_" * dice.randint(0, 1) + dice.choice(AGGREGATIONS)
        vote = {"vote": dice.choice(["weighted", "majority"]), "answers": dice.choice(["number", r"regex:=(\d+);$"])}
        options = {"aggregation": aggregation, "partial": dice.random() < 0.3, **(vote if dice.random() < 0.5 else {})}
        calls.append({"method": "rank", "arguments": [dice.choice(prompts), dice.choice(puzzles)], "options": options})
    voting = {"n": 9, "seed": dice.randint(0, 99), "vote": "weighted", "answers": r"regex:=(\d+);\n?$"}
    calls.append({"method": "generate", "arguments": [prompts[0]], "options": voting})
    (answers,) = ask(npm_folder, [{"artifact": str(countdown), "calls": calls}])
    assert check(countdown, calls, answers) == 0


def test_a_hundred_puzzles(countdown, npm_folder, dice):
    puzzles = [puzzle.prompt for puzzle, _ in draw_puzzles(dice, 4, 100, test=True)]
    calls = [
        {"method": "generate", "arguments": [prompt], "options": {"n": 16, "seed": seed}}
        for seed, prompt in enumerate(puzzles)
    ]
    (answers,) = ask(npm_folder, [{"artifact": str(countdown), "calls": calls}])
    model, others = bonnx.load(countdown, provider="cpu"), 0
    for seed, (prompt, answer) in enumerate(zip(puzzles, answers, strict=True)):
        expected = model.generate(prompt, n=16, seed=seed)
        found = answer["result"]
        tokens = [candidate.tokens.tolist() for candidate in expected.candidates]
        if [candidate["tokens"] for candidate in found["candidates"]] != tokens:
            others += 1
            continue
        # Candidates that are as good as equal may be in another order.
        assert abs(expected.candidates[found["bestIndex"]].score - expected.best.score) < 1e-5
    # A draw that rounding decides: one in tens of thousands.
    assert others <= 2


def test_no_tokenizer_and_embeddings(tiny, small, npm_folder, dice, rng):
    """Token ids where there is no tokenizer, and embeddings where there are no tokens."""
    ids = [[dice.randrange(130) for _ in range(dice.randint(1, 12))] for _ in range(8)]
    calls = generate_calls(dice, 8, ids, [[5], [7, 9], []])
    for _ in range(6):
        options = {"aggregation": dice.choice(["step_", ""]) + dice.choice(AGGREGATIONS)}
        calls.append({"method": "rank", "arguments": [ids[0], ids[1 : dice.randint(2, 8)]], "options": options})
    of_rows = []
    for _ in range(6):
        prompt, *candidates = (np.float32(rng.standard_normal((dice.randint(1, 5), 12))).tolist() for _ in range(4))
        masks = {"aggregation": "step_mean", "stepMasks": [[1] * len(rows) for rows in candidates]}
        options = dice.choice([{}, masks])
        of_rows.append(
            {"method": "rank", "arguments": [prompt, [*candidates, []][: 3 if options else 4]], "options": options}
        )
    questions = [{"artifact": str(tiny), "calls": calls}, {"artifact": str(small), "calls": of_rows}]
    answers = ask(npm_folder, questions)
    assert check(tiny, calls, answers[0]) == 0
    assert check(small, of_rows, answers[1]) == 0


def test_a_single_file(countdown, npm_folder, tmp_path, dice):
    """One graph with the weights inside; what needs another is refused."""
    alone = ("onToken", "deadline")
    generates, ranks = (folded(countdown, tmp_path / name, name) for name in ("generate", "rank"))
    prompts = ["3,7,20,24>1:", "4,9,13>43:"]
    calls = [
        {**call, "options": {name: value for name, value in call["options"].items() if name not in alone}}
        for call in generate_calls(dice, 4, prompts, [[]], prunes=False)
    ]
    ranked = [{"method": "rank", "arguments": [prompts[0], ["24-20=4;7-4=3;3/3=1;", "24/3=8;"]]}]
    growing = {"method": "generate", "arguments": [prompts[0]], "options": {"onToken": True}}
    questions = [{"artifact": str(generates), "calls": [*calls, growing]}, {"artifact": str(ranks), "calls": ranked}]
    (*generated, refused), rankings = ask(npm_folder, questions)
    assert check(generates, calls, generated) == 0
    assert check(ranks, ranked, rankings) == 0
    assert refused["code"] == "input"
    assert "without --single-file" in refused["error"]


def test_candidates_that_rotate_by_their_own_length(npm_folder, tmp_path, dice, rng):
    torch.manual_seed(dice.randrange(2**31))
    scaling = {"kind": "longrope", "factor": 4.0, "original_max_positions": 12, "attention_factor": 1.2}
    scaling |= {"short_factors": [1.0, 1.1], "long_factors": [2.0, 9.0]}
    network = build(embed_dim=16, hidden_size=16, num_layers=2, scorer_hidden=8, rope_scaling=scaling).eval()
    export_model(network, tmp_path / "out", name="longrope", verification="quick")
    calls = []
    for _ in range(6):
        prompt, *candidates = (np.float32(rng.standard_normal((n, 16))).tolist() for n in (9, 3, 5, 1, 11))
        options = dice.choice([{}, {"vote": "majority", "answers": ["a", "b", "c", "b"]}, {"aggregation": "mean"}])
        calls.append({"method": "rank", "arguments": [prompt, candidates], "options": options})
    (answers,) = ask(npm_folder, [{"artifact": str(tmp_path / "out"), "calls": calls}])
    assert check(tmp_path / "out", calls, answers) == 0


@pytest.mark.parametrize(("family", "head"), [("Llama", "reward"), ("Qwen2", "steps"), ("Llama", "mlp steps")])
def test_reward_models(npm_folder, tmp_path, dice, rng, family, head):
    case = make(tmp_path / "checkpoint", family, head, rng)
    artifact = export(tmp_path, case.overrides, verification="quick")
    calls = rank_calls(dice, 40, steps="steps" in head)
    (answers,) = ask(npm_folder, [{"artifact": str(artifact), "calls": calls}])
    assert check(artifact, calls, answers) < 25


def test_an_appended_token_and_a_gate(npm_folder, tmp_path, dice, rng):
    make_other(tmp_path / "one/checkpoint", "v_head at the cls token (Athene)", rng)
    make_gated(tmp_path / "two/checkpoint", "ArmoRM", rng)
    appended, gated = (export(tmp_path / name, verification="quick") for name in ("one", "two"))
    calls, of_gate = rank_calls(dice, 20), rank_calls(dice, 20, chats=0.8)
    for call in of_gate[:6]:
        # The gate then reads a candidate: they share no prompt.
        call["arguments"][1].append(f"Yes.{HEADER}{text(dice)}")
    answers = ask(npm_folder, [{"artifact": str(appended), "calls": calls}, {"artifact": str(gated), "calls": of_gate}])
    assert check(appended, calls, answers[0]) < 15
    assert check(gated, of_gate, answers[1]) < 19


def test_a_reranker_and_a_model_without_a_scorer(npm_folder, tmp_path, dice, rng):
    _, tokenizer = make_causal(tmp_path / "causal", rng)
    tokens = tokenizer.convert_tokens_to_ids(["yes", "no"])
    (tmp_path / "one").mkdir()
    save_description(tmp_path / "causal", tmp_path / "one/checkpoint", tokens)
    make_causal(tmp_path / "two/checkpoint", rng)
    reranker, generator = (
        export(tmp_path / name, no_scorer=name == "two", verification="quick") for name in ("one", "two")
    )
    calls = []
    for _ in range(20):
        documents = [dice.choice([*DOCUMENTS, text(dice)]) for _ in range(dice.randint(1, 6))]
        options = {"instruction": dice.choice(["Find it.", text(dice, 2)])} if dice.random() < 0.4 else {}
        calls.append({"method": "rank", "arguments": [dice.choice(QUERIES), documents], "options": options})
    generated = generate_calls(dice, 15, [text(dice) or "a", *QUERIES], [["\n"], ["e"], ["is"], ["one", "two"], []])
    questions = [{"artifact": str(reranker), "calls": calls}, {"artifact": str(generator), "calls": generated}]
    answers = ask(npm_folder, questions)
    assert check(reranker, calls, answers[0]) < 10
    assert check(generator, generated, answers[1]) == 0


def test_the_package_is_of_this_version_and_knows_every_rule():
    package = json.loads((ROOT / "js/package.json").read_text(encoding="utf-8"))
    assert (package["name"], package["version"]) == ("bonnx", bonnx.__version__)
    source = (ROOT / "js/manifest.mjs").read_text(encoding="utf-8")
    known = re.search(r"const KNOWN = \{(.*?)\n\};", source, re.DOTALL)[1]
    found = {name: set(names.split()) for name, names in re.findall(r'"?([\w.]+)"?: words\(\s*"([^"]*)"', known)}
    parts = {"manifest.json": Manifest, "scoring": Scoring, "text": TextRules, "text.pair": PairRules, "limits": Limits}
    assert found == {name: set(part.__struct_fields__) for name, part in parts.items()}


def test_every_code_is_documented():
    listed = re.search(
        r"CODES = Object.freeze\(\[(.*?)\]\)", (ROOT / "js/errors.mjs").read_text(encoding="utf-8"), re.DOTALL
    )
    typed = re.search(r"type Code =(.*?);", (ROOT / "js/bonnx.d.mts").read_text(encoding="utf-8"), re.DOTALL)
    page = (ROOT / "docs/javascript.md").read_text(encoding="utf-8").partition("## Errors")[2]
    codes = re.findall(r'"([\w-]+)"', listed[1])
    assert codes == re.findall(r'"([\w-]+)"', typed[1]) == re.findall(r"(?m)^\| `([\w-]+)` \|", page)


def test_the_tests_of_the_package(npm_folder):
    command = [shutil.which("npm"), "test"]
    done = subprocess.run(command, cwd=npm_folder / "js", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_types(npm_folder):
    shutil.copy(ROOT / "tests/js/types.mts", npm_folder)
    checked = ["--noEmit", "--strict", "--target", "es2024", "--module", "nodenext", "--skipLibCheck", "types.mts"]
    command = [shutil.which("node"), "node_modules/typescript/bin/tsc", *checked]
    done = subprocess.run(command, cwd=npm_folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/javascript.md"])
def test_the_programs_of_the_pages(countdown, npm_folder, page):
    (npm_folder / "artifacts").mkdir(exist_ok=True)
    if not (npm_folder / "artifacts/countdown").exists():
        (npm_folder / "artifacts/countdown").symlink_to(countdown, target_is_directory=True)
    blocks = [b for b in read_blocks((ROOT / page).read_text(encoding="utf-8")) if b.reason == EXAMPLE]
    assert blocks
    for block in blocks:
        (npm_folder / "page.mjs").write_text(block.code, encoding="utf-8")
        printed = in_node(npm_folder, "page.mjs")
        wanted = re.findall(r"console\.log\(.*\); // (.*)", block.code)
        pattern = "\n".join(re.escape(line).replace(re.escape("..."), ".*") for line in wanted)
        assert re.fullmatch(pattern, printed.rstrip("\n")), f"{page}, line {block.line}: {printed}"

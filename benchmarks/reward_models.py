"""Families x heads: export and rank checkpoints of transformers with the commands, and compare with transformers.

`python -m benchmarks.reward_models` prints the table; `--families` and `--heads` select a part of it. The checkpoints
are small and random; texts, chats and steps use the tokenizer and template in the checkpoint's folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import ANSWERS, FAMILIES, HEADS, QUESTION, Case, make, rewards

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments: str) -> Any:
    done = subprocess.run([sys.executable, "-m", "bonnx", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bonnx {' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout)


def export(folder: Path, case: Case) -> Path:
    arguments = [sys.executable, str(ROOT / "export.py"), "--checkpoint", str(folder / "checkpoint")]
    done = subprocess.run(
        [*arguments, "-o", str(folder / "out"), *case.arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return folder / "out"


def rank(folder: Path, prompt: str) -> Any:
    (folder / "candidates.json").write_text(json.dumps(ANSWERS), encoding="utf-8")
    return command(
        "rank", str(folder / "out"), "--prompt", prompt, "--candidates", str(folder / "candidates.json"), "--json"
    )


def chat_rewards(case: Case, messages: list[dict[str, str]]) -> Any:
    """Return transformers' rewards for the answers in a conversation."""
    rewards = []
    opening = case.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for answer in ANSWERS:
        if case.step == "<extra_0>":
            answer += case.step
        reply = {"role": "assistant", "content": answer}
        text = case.tokenizer.apply_chat_template([*messages, reply], tokenize=False)
        # The template's own newline after the answer does not end a step.
        stop = len(text) if case.step is None else text.index(answer.strip(), len(opening)) + len(answer)
        rewards.append(case.reward(text, len(opening), special=False, stop=stop))
    return np.array(rewards)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| family | head | text: relative difference | chat | same winner |")
    print("|---|---|---|---|---|")
    messages = [{"role": "user", "content": QUESTION}]
    for family in arguments.families:
        for head in arguments.heads:
            rng = np.random.default_rng(arguments.seed)
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                case = make(folder / "checkpoint", family, head, rng)
                export(folder, case)
                worst, same = [], True
                for prompt, expected in (
                    (QUESTION, rewards(case)),
                    (json.dumps(messages), chat_rewards(case, messages)),
                ):
                    ranking = rank(folder, prompt)
                    scores = np.array(ranking["candidate_scores"])
                    worst.append(float(np.max(np.abs(scores - expected) / np.abs(expected))))
                    same &= ranking["best_index"] == int(expected.argmax())
            shown = " | ".join(f"{value:.1e}" for value in worst)
            print(f"| {family} | {head} | {shown} | {'yes' if same else 'NO'} |", flush=True)


if __name__ == "__main__":
    main()

"""Models of transformers' own classes, and process reward models of one linear layer or an MLP."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import ANSWERS, QUESTION, HeadCase, make, rewards

from ..row import Case, Check, Row

MESSAGES = [{"role": "user", "content": QUESTION}]


def in_conversation(case: HeadCase) -> np.ndarray:
    """Return transformers' scores for the answers in a conversation."""
    scores = []
    opening = case.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    for answer in ANSWERS:
        if case.step == "<extra_0>":
            answer += case.step
        reply = {"role": "assistant", "content": answer}
        text = case.tokenizer.apply_chat_template([*MESSAGES, reply], tokenize=False)
        # The template's own newline after the answer does not end a step.
        stop = len(text) if case.step is None else text.index(answer.strip(), len(opening)) + len(answer)
        scores.append(case.reward(text, len(opening), special=False, stop=stop))
    return np.array(scores)


def build(family: str, head: str, options: dict[str, Any], folder: Path, rng: np.random.Generator) -> Case:
    """A checkpoint of `tests/checkpoints.py`, ranked as text and as a conversation."""
    case = make(folder, family, head, rng, **options)
    checks = [Check(QUESTION, ANSWERS, rewards(case)), Check(MESSAGES, ANSWERS, in_conversation(case))]
    return Case(checks, case.arguments)


def row(model: str, family: str, head: str, shape: str, **options: Any) -> Row:
    """A row of the table: a family, a head of `tests/checkpoints.py`, and fields of the config."""
    return Row(model, shape, "transformers", partial(build, family, head, options))


ROWS = [
    row("Skywork-Reward-V2-Qwen3", "Qwen3", "reward", "1 label, last token"),
    row("Skywork-Reward-V2-Llama, Skywork-Reward-8B-v0.2, FsfairX, GRM, BTRM", "Llama", "reward", "1 label"),
    row("RM-Mistral, OffsetBias", "Mistral", "reward", "1 label"),
    row("classifier of several labels", "Llama", "labels", "--label, softmax"),
    row("Qwen2.5-Math-RM", "Qwen2", "mlp", "`score.0`, `score.2`"),
    row("Qwen2.5-Math-PRM", "Qwen2", "mlp steps", "`score.0`, `score.2` at `<extra_0>`"),
    row("PRMTrainer of TRL", "Qwen2", "steps", "2 labels at steps"),
    row("Skywork-o1-Open-PRM", "Qwen2", "value", "`v_head.summary` at steps"),
    row("RLHFlow PRMs, math-shepherd", "Llama", "step tag", "`+` against `-` at steps"),
]

"""Heads of others' classes: transformers' backbone, and the head in plain PyTorch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from tests.checkpoints import ANSWERS, QUESTION
from tests.head_checkpoints import REWARD_TOKEN, make_other, whole

from ..row import Case, Check, Row

MESSAGES = [{"role": "user", "content": QUESTION}]


def build(name: str, family: str, folder: Path, rng: np.random.Generator) -> Case:
    """A checkpoint of `tests/head_checkpoints.py`, ranked as text and as a conversation."""
    case = make_other(folder, name, rng, family)
    expected = np.array([case.reward(whole(name, QUESTION + answer)) for answer in ANSWERS])
    texts = [
        case.tokenizer.apply_chat_template([*MESSAGES, {"role": "assistant", "content": answer}], tokenize=False)
        for answer in ANSWERS
    ]
    in_conversation = np.array([case.reward(whole(name, text), special=False) for text in texts])
    return Case([Check(QUESTION, ANSWERS, expected), Check(MESSAGES, ANSWERS, in_conversation)], case.arguments)


def _row(model: str, family: str, shape: str, name: str) -> Row:
    return Row(model, shape, "plain PyTorch", partial(build, name, family))


ROWS = [
    _row("OpenRLHF", "Llama", "`value_head`, mean and std", "value_head, normalized (OpenRLHF)"),
    _row("Eurus-RM", "Mistral", "`regression_head`", "regression_head (Eurus, UltraRM)"),
    _row("UltraRM", "Llama", "`regression_head`", "regression_head (Eurus, UltraRM)"),
    _row("Beaver", "Llama", "`score_head`", "score_head, raw (Beaver)"),
    _row("Beaver, normalized", "Llama", "`score_head`, variance", "score_head, normalized (Beaver)"),
    _row("GRM sftreg", "Llama", "`v_head.summary.0`, `.2`", "v_head.summary.0, .2 (GRM)"),
    _row("LLaMA-Factory", "Qwen2", "`value_head.safetensors`", "value_head.safetensors (LLaMA-Factory)"),
    _row("Athene-RM", "Llama", "`v_head` at the cls token", "v_head at the cls token (Athene)"),
    _row(
        "InternLM2-Reward, POLAR",
        "InternLM2",
        "`v_head` at `reward_token_id`",
        "v_head at the reward token (InternLM2-Reward)",
    ),
    _row("unknown MLP", "Qwen3", "--head", "declared MLP"),
    _row(
        "unknown linear head",
        "Llama",
        f"--head, `{REWARD_TOKEN}` appended",
        "declared linear head at an appended token",
    ),
]

"""Gated heads: transformers' backbone, and objectives and gate in plain PyTorch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from tests.checkpoints import ANSWERS
from tests.gated_checkpoints import MESSAGES, make_gated

from ..row import Case, Check, Row


def build(kind: str, folder: Path, rng: np.random.Generator) -> Case:
    """A checkpoint of `tests/gated_checkpoints.py`, ranked after conversations, and scored in whole ones."""
    case = make_gated(folder, kind, rng)
    after = {
        len(messages): np.array([case.reward(case.text(messages, answer))[0] for answer in ANSWERS])
        for messages in (MESSAGES, MESSAGES[:1])
    }
    conversations = [[*MESSAGES, {"role": "assistant", "content": answer}] for answer in ANSWERS]
    checks = [Check(MESSAGES[:length], ANSWERS, expected) for length, expected in after.items()]
    return Case([*checks, Check(None, conversations, after[len(MESSAGES)])])


ROWS = [
    Row("ArmoRM", "gate over 19 objectives", "plain PyTorch", partial(build, "ArmoRM")),
    Row("QRM-Llama3.1", "gate over quantiles", "plain PyTorch", partial(build, "QRM")),
]

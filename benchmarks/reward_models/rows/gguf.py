"""Reward models as GGUF files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from tests import gguf_files
from tests.checkpoints import ANSWERS, QUESTION, make, rewards

from ..row import Case, Check, Row


def build(family: str, kind: str, folder: Path, rng: np.random.Generator) -> Case:
    """A file beside its tokenizer, and the rewards of the model that its weights are rounded from."""
    case = make(folder, family, "reward", rng)
    for parameter in case.model.parameters():
        parameter.data = parameter.data.half().float()
    path = folder / "model.gguf"
    gguf_files.write(path, case.model, kind)
    return Case([Check(QUESTION, ANSWERS, rewards(case))], checkpoint=path)


ROWS = [
    Row("GGUF file with a rank head", f"`cls.output`, {kind}, {family}", "transformers", partial(build, family, kind))
    for family, kind in (("Llama", "F16"), ("Qwen3", "F16"))
]

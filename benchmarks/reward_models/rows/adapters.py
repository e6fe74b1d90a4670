"""LoRA adapters of peft: the base model lies beside them, the head only in the adapter."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from tests.checkpoints import ANSWERS, QUESTION, make

from ..row import Case, Check, Row


def build(family: str, options: dict[str, Any], folder: Path, rng: np.random.Generator) -> Case:
    """An adapter of random weights, and the rewards that peft computes with it."""
    causal = make(folder.with_name("base"), family, "step tag", rng)
    tokenizer, pad = causal.tokenizer, causal.tokenizer.pad_token_id
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder.with_name("base"), num_labels=1, dtype=torch.float32, pad_token_id=pad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about embeddings that are saved too
        trained = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **options)).eval()
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                # Scores near 0 would be compared in their rounding errors.
                parameter.data += (1 if "score" in name else 0.1) * torch.randn_like(parameter)
        trained.save_pretrained(folder)
    expected = []
    for answer in ANSWERS:
        ids = tokenizer(QUESTION + answer, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(float(trained(ids).logits[0, 0]))
    return Case([Check(QUESTION, ANSWERS, np.array(expected))])


def _row(family: str, shape: str, **options: Any) -> Row:
    return Row("RewardTrainer of TRL with LoRA", f"{shape}, {family}", "peft", partial(build, family, options))


ROWS = [
    _row("Llama", "all linear layers", r=8, target_modules="all-linear"),
    _row(
        "Qwen2",
        "rslora, rank and alpha patterns",
        r=4,
        use_rslora=True,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 3},
    ),
    _row("Qwen3", "embeddings", r=4, target_modules=["embed_tokens", "v_proj", "down_proj"]),
]

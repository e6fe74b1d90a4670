"""LLM rerankers: as Sentence Transformers describes them, and as their makers published them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from tests.rerankers import (
    DOCUMENTS,
    INSTRUCTION,
    QUERIES,
    make_causal,
    predict,
    published_scores,
    save_description,
)

from ..row import Case, Check, Row

QUERY = QUERIES[0]


def described(folder: Path, rng: np.random.Generator) -> Case:
    """A Qwen3-Reranker with Sentence Transformers' files, with and without an instruction."""
    _, tokenizer = make_causal(folder.with_name("causal"), rng)
    tokens = tokenizer.convert_tokens_to_ids(["yes", "no"])
    encoder = save_description(folder.with_name("causal"), folder, tokens)
    scores = predict(encoder, QUERY, DOCUMENTS), predict(encoder, QUERY, DOCUMENTS, INSTRUCTION)
    return Case([Check(QUERY, DOCUMENTS, scores[0]), Check(QUERY, DOCUMENTS, scores[1], {"instruction": INSTRUCTION})])


def published(kind: str, family: str, folder: Path, rng: np.random.Generator) -> Case:
    """A causal model without a description, scored as its makers do."""
    model, tokenizer = make_causal(folder, rng, family, "<bos>" if kind == "bge-gemma" else None)
    # A logit may be near 0, where float32's own rounding is large beside it.
    model.double()
    checks = [Check(QUERY, DOCUMENTS, published_scores(kind, model, tokenizer, QUERY, DOCUMENTS))]
    if kind != "zerank":
        instructed = published_scores(kind, model, tokenizer, QUERY, DOCUMENTS, INSTRUCTION)
        checks.append(Check(QUERY, DOCUMENTS, instructed, {"instruction": INSTRUCTION}))
    return Case(checks, ["--reranker", kind])


def _row(model: str, kind: str, family: str, head: str) -> Row:
    return Row(model, head, "its makers' formula, transformers in float64", partial(published, kind, family))


ROWS = [
    Row("Qwen3-Reranker, zerank, ctxl-rerank with modules.json", "`LogitScore`", "sentence-transformers", described),
    _row("Qwen3-Reranker", "qwen3", "Qwen3", '"yes" against "no"'),
    _row("mxbai-rerank-v2", "mxbai", "Qwen2", 'logit("1") - logit("0")'),
    _row("zerank-1, zerank-2", "zerank", "Qwen3", 'sigmoid(logit("Yes") / 5)'),
    _row("ctxl-rerank-v2", "ctxl", "Qwen3", "logit of token 0"),
    _row("bge-reranker-v2-gemma", "bge-gemma", "Gemma", 'logit("Yes")'),
]

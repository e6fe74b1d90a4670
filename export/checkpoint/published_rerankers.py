"""LLM rerankers as their makers published them, without a description of their own: tokens, activation and template.

===================================  ===============================  =====================================
name                                 score                            defined in
===================================  ===============================  =====================================
`qwen3`: Qwen3-Reranker              P("yes") against "no"            its model card
`mxbai`: mxbai-rerank-v2             logit("1") - logit("0")          the package mxbai-rerank
`zerank`: zerank-1, zerank-2         sigmoid(logit("Yes") / 5)        modeling_zeranker.py, in the repository
`ctxl`: ctxl-rerank-v2               logit of token 0                 its model card
`bge-gemma`: bge-reranker-v2-gemma   logit("Yes")                     the package FlagEmbedding
===================================  ===============================  =====================================

A template gets the messages `system` (the instruction, if there is one), `query` and `document`, as those of Sentence
Transformers do. `border` is where a maker tokenizes what comes next by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["PUBLISHED", "PublishedReranker", "as_jinja", "published_as", "resembling"]

_PARTS = (
    '{%- set instruction = messages | selectattr("role", "eq", "system") | map(attribute="content") | first -%}'
    '{%- set query = messages | selectattr("role", "eq", "query") | map(attribute="content") | first -%}'
    '{%- set document = messages | selectattr("role", "eq", "document") | map(attribute="content") | first -%}'
)
_QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    '<Instruct>: {{ instruction | default("Given a web search query, retrieve relevant passages that answer the '
    'query") }}\n<Query>: {{ query }}\n<Document>: {{ document }}<|im_end|>\n<|im_start|>assistant\n'
    '{{ "<think>\\n\\n</think>\\n\\n" }}'
)
_MXBAI = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{{ border }}"
    '{% if instruction %}{{ "instruction: " ~ instruction ~ "\\n" }}{% endif %}query: {{ query }}'
    '{{ border ~ "\\n" ~ border }}document: {{ document }}{{ border ~ "\\n" ~ border }}'
    "You are a search relevance expert who evaluates how well documents match search queries. For each "
    "query-document pair, carefully analyze the semantic relationship between them, then provide your binary relevance "
    "judgment (0 for not relevant, 1 for relevant).\nRelevance:{{ border }}"
    '<|im_end|>\n{{ "<|im_start|>assistant\\n" }}'
)
_ZERANK = (
    "<|im_start|>system\n{{ query | trim }}<|im_end|>\n<|im_start|>user\n{{ document | trim }}<|im_end|>\n"
    '{{ "<|im_start|>assistant\\n" }}'
)
_CTXL = (
    "{{ bos_token }}Check whether a given document contains information helpful to answer the query.\n"
    "<Document> {{ document }}\n<Query> {{ query }}{% if instruction %} {{ instruction }}{% endif %} ??"
)
_BGE_GEMMA = (
    '{{ bos_token ~ border }}A: {{ query }}{{ border ~ "\\n" ~ border }}'
    'B: {{ document }}{{ border ~ "\\n" ~ border }}'
    '{{ instruction | default("Given a query A and a passage B, determine whether the passage contains an answer to '
    "the query by providing a prediction of either 'Yes' or 'No'.\") }}"
)


@dataclass(frozen=True)
class PublishedReranker:
    """A reranker and how its makers compute its score.

    Attributes:
        repositories: matches the names of its repositories on the hub, without the organization, in lower case.
        labels: the tokens that answer, by their texts or their ids: the one that means good, then the other if there is
            one. The score is the logit of the first, minus that of the second.
        template: makes one text of a query and a document.
        activation: applied to the score.
        divisor: what the score is divided by before that.
    """

    repositories: str
    labels: tuple[str, ...] | tuple[int, ...]
    template: str
    activation: Literal["none", "sigmoid"] = "none"
    divisor: float = 1.0


PUBLISHED: Mapping[str, PublishedReranker] = {
    "qwen3": PublishedReranker(r"qwen3-reranker-[\d.]+b", ("yes", "no"), _PARTS + _QWEN3, "sigmoid"),
    "mxbai": PublishedReranker(r"mxbai-rerank-(base|large)-v2", ("1", "0"), _PARTS + _MXBAI),
    "zerank": PublishedReranker(r"zerank-[12](-small|-reranker)*", ("Yes",), _PARTS + _ZERANK, "sigmoid", 5.0),
    "ctxl": PublishedReranker(r"ctxl-rerank-v2-instruct-multilingual-\d+b", (0,), _PARTS + _CTXL),
    "bge-gemma": PublishedReranker(r"bge-reranker-v2-gemma", ("Yes",), _PARTS + _BGE_GEMMA),
}
# The organizations that published them.
_MAKERS = {"qwen", "mixedbread-ai", "zeroentropy", "contextualai", "baai"}


def as_jinja(text: str) -> str:
    """Return the template for a text of llama.cpp, which has `{query}` and `{document}` where these belong."""
    names = {"{query}": "{{ query }}", "{document}": "{{ document }}"}
    pieces = re.split(r"(\{query\}|\{document\})", text)
    # As a constant, a piece may contain what Jinja would read as its own.
    return _PARTS + "".join(names.get(p) or f"{{{{ {json.dumps(p, ensure_ascii=False)} }}}}" for p in pieces if p)


def published_as(folder: Path, config: Mapping[str, object], repository: str | None) -> str | None:
    """Return the name of the reranker that a checkpoint certainly is; None if nothing proves that it is one.

    Args:
        folder: the checkpoint. In the hub's cache its path names the repository.
        config: the parsed config.json.
        repository: `org/name` on the hub, if it came from there.
    """
    cache = folder.absolute().parent.parent.name
    if repository is None and folder.absolute().parent.name == "snapshots" and cache.startswith("models--"):
        repository = cache.removeprefix("models--").replace("--", "/")
    organization, _, name = (repository or "").lower().partition("/")
    if organization in _MAKERS and (known := _match(name, exact=True)):
        return known
    return "zerank" if "modeling_zeranker" in str(config.get("auto_map")) else None


def resembling(folder: Path, config: Mapping[str, object]) -> str | None:
    """Return the reranker that a checkpoint may be a copy of, by its folder's name or the one in config.json."""
    names = (folder.resolve().name, str(config.get("_name_or_path", "")).rstrip("/").rpartition("/")[2])
    return next((name for text in names if (name := _match(text.lower(), exact=False))), None)


def _match(text: str, *, exact: bool) -> str | None:
    find = re.fullmatch if exact else re.search
    return next((name for name, reranker in PUBLISHED.items() if find(reranker.repositories, text)), None)

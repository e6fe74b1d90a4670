"""Find out how a reranker scores a pair: from its description, or from the published reranker that it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from bonnx.errors import ArtifactError, InputError
from bonnx.models.config import ConfigError
from bonnx.models.head import LabelTokens
from bonnx.models.opened import OpenedCheckpoint
from bonnx.runtime.artifact.manifest import PairRules
from bonnx.runtime.text.pair import PairTemplate

from .label_tokens import answer_token
from .published_rerankers import PUBLISHED, as_jinja, published_as
from .sentence_transformers import content_of, read_description
from .tokenizer import TextFiles

__all__ = ["PAIR_TEMPLATE", "Reranker", "find_reranker", "with_instruction"]

PAIR_TEMPLATE = "pair_template.jinja"


@dataclass(frozen=True)
class Reranker:
    """How a reranker scores a query and a document.

    Attributes:
        labels: the tokens whose logits are the score; None if the checkpoint has a scorer.
        activation: applied to the score; None for what the checkpoint's scorer implies.
        template: source of the template that makes one text of a query and a document.
        rules: how the template is used.
        max_tokens: longer texts would be cut; None for the model's own maximum.
    """

    labels: LabelTokens | None
    activation: Literal["none", "sigmoid"] | None
    template: str
    rules: PairRules
    max_tokens: int | None = None


def find_reranker(
    opened: OpenedCheckpoint, tokenizer: TextFiles | None, *, name: str | None, repository: str | None
) -> Reranker | None:
    """Find out whether a checkpoint is a reranker, and how it scores.

    Args:
        opened: the checkpoint.
        tokenizer: the checkpoint's.
        name: the caller's own word for it, one of `PUBLISHED`; it overrides what the checkpoint says.
        repository: `org/name` on the hub, if it came from there.

    Raises:
        ConfigError: if its description is not supported, it has no tokenizer, or its template ignores a query or a
            document.
        InputError: if `name` is unknown, or a label is several tokens.
    """
    folder, config = opened.path, opened.config
    if name is not None and name not in PUBLISHED:
        raise InputError(f"--reranker: expected one of {', '.join(PUBLISHED)}; got {name!r}")
    described = None if name is not None else read_description(folder, config)
    if name is None and described is None and opened.pair_template is None:
        name = published_as(folder, config, repository)
    if described is None and name is None and opened.pair_template is None:
        return None
    if tokenizer is None:
        raise ConfigError(
            f"{folder}: a reranker reads text, and the checkpoint has no tokenizer (tokenizer.json); add the tokenizer "
            "files of the model that it was made from"
        )
    if described is not None:
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"{folder}: its query and document go through the chat template, and the checkpoint has none; add its "
                "chat_template.jinja"
            )
        template, content = tokenizer.chat_template, described.content or content_of(tokenizer.chat_template)
        rules = PairRules(
            template=PAIR_TEMPLATE, content=content, options=described.options, instruction=described.instruction
        )
        found = Reranker(described.labels, described.activation, template, rules, described.max_tokens)
    elif name is None:
        found = Reranker(None, None, as_jinja(str(opened.pair_template)), PairRules(template=PAIR_TEMPLATE))
    else:
        published = PUBLISHED[name]
        ids = tuple(label if isinstance(label, int) else answer_token(label, tokenizer) for label in published.labels)
        labels = LabelTokens(ids, contrast=True, divisor=published.divisor)
        found = Reranker(labels, published.activation, published.template, PairRules(template=PAIR_TEMPLATE))
    _check_template(folder, found, tokenizer)
    return found


def with_instruction(reranker: Reranker, tokenizer: TextFiles, instruction: str) -> Reranker:
    """Return a reranker whose template gets an instruction by default.

    Raises:
        InputError: if the template takes none.
    """
    if not PairTemplate(reranker.template, tokenizer.special_tokens, reranker.rules).takes_instruction:
        raise InputError("--instruction: the template of this reranker takes none; leave it out")
    return replace(reranker, rules=msgspec.structs.replace(reranker.rules, instruction=instruction))


def _check_template(folder: Path, reranker: Reranker, tokenizer: TextFiles) -> None:
    """Refuse a template that does not show a query or a document to the model."""
    try:
        ignored = PairTemplate(reranker.template, tokenizer.special_tokens, reranker.rules).ignored()
    except (ArtifactError, InputError) as e:
        raise ConfigError(f"{folder}: its template cannot make a text of a query and a document: {e}") from e
    if ignored:
        raise ConfigError(
            f"{folder}: its chat template ignores the {' and the '.join(ignored)}, so the score would not depend on "
            "it; expected a template that writes the messages of the roles 'query' and 'document'"
        )

"""The tokens with which a language model answers, from their texts or their ids."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

from bonnx.errors import InputError
from bonnx.models.head import LabelTokens

from .tokenizer import TextFiles

__all__ = ["answer_token", "read_label_tokens", "token_ids"]


def read_label_tokens(
    texts: Sequence[str] | None, ids: Sequence[int] | None, tokenizer: TextFiles | None, foreign: bool
) -> LabelTokens | None:
    """Read `--label-tokens` or `--label-token-ids`; None if neither is given.

    Args:
        texts: the token that means good, then the others.
        ids: the same, by their ids.
        tokenizer: the checkpoint's.
        foreign: whether the checkpoint is in the format of transformers.

    Raises:
        InputError: if both are given, there are fewer than two distinct tokens, or a text is not exactly one.
    """
    if texts is None and ids is None:
        return None
    option, tokens_or_ids = ("--label-tokens", texts) if ids is None else ("--label-token-ids", ids)
    if texts is not None and ids is not None:
        raise InputError("--label-tokens and --label-token-ids: expected one of the two, texts or ids")
    if not foreign or tokens_or_ids is None or len(tokens_or_ids) < 2:
        raise InputError(
            f"{option}: expected the token that means good and at least one other, for a language model in the "
            f"format of transformers; got {tokens_or_ids}"
        )
    if ids is None and tokenizer is None:
        raise InputError("--label-tokens: the checkpoint has no tokenizer; pass --label-token-ids")
    tokens = tuple(ids) if ids is not None else tuple(_stated_token(text, tokenizer) for text in texts or ())
    if len(set(tokens)) < len(tokens):
        raise InputError(f"{option}: expected distinct tokens; got {tokens_or_ids}, with the ids {list(tokens)}")
    return LabelTokens(tokens)


def answer_token(text: str, tokenizer: TextFiles) -> int:
    """Return the id of the token with which a reranker answers.

    Raises:
        InputError: if the tokenizer splits it.
    """
    ids = token_ids(text, tokenizer)
    if len(ids) != 1:
        raise InputError(
            f"the reranker answers with a token, and this tokenizer splits it; got {text!r}, {len(ids)} tokens; "
            "expected the tokenizer of the model that --reranker names"
        )
    return ids[0]


def token_ids(text: str, tokenizer: TextFiles) -> list[int]:
    """Return the ids of a text without special tokens."""
    tokens: list[int] = tokenizers.Tokenizer.from_buffer(tokenizer.json).encode(text, add_special_tokens=False).ids
    return tokens


def _stated_token(text: str, tokenizer: TextFiles | None) -> int:
    """Return the id of a text that is exactly one token."""
    assert tokenizer is not None
    ids = token_ids(text, tokenizer)
    if len(ids) != 1:
        hint = f"; if it is an id, pass --label-token-ids {text}" if text.isdecimal() else ""
        raise InputError(
            f"--label-tokens: expected the text of exactly one token; got {text!r}, {len(ids)} tokens{hint}"
        )
    return ids[0]

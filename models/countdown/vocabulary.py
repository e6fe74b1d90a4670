"""Countdown's tokens, one for each whole number 0..999 and each symbol, and the tokenizer that is included."""

from __future__ import annotations

import re

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

__all__ = ["END", "PAD", "STEP", "VOCABULARY", "decode", "encode", "make_tokenizer"]

_SYMBOLS = [",", ">", ":", "+", "-", "*", "/", "=", ";", "\n", "<pad>", "<unk>"]
VOCABULARY = {text: i for i, text in enumerate([*map(str, range(1000)), *_SYMBOLS])}
_TEXTS = list(VOCABULARY)
STEP, END, PAD = VOCABULARY[";"], VOCABULARY["\n"], VOCABULARY["<pad>"]
_PIECE = re.compile(r"[0-9]+|[^0-9]")


def encode(text: str) -> list[int]:
    """Return the token ids of a text.

    Raises:
        KeyError: if the text has a number above 999 or an unknown symbol.
    """
    return [VOCABULARY[piece] for piece in _PIECE.findall(text)]


def decode(ids: list[int]) -> str:
    """Return the text of token ids."""
    return "".join(_TEXTS[i] for i in ids)


def make_tokenizer() -> tokenizers.Tokenizer:
    """Return the same vocabulary as a Hugging Face tokenizer, for programs that are independent of Countdown."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("[0-9]+|[^0-9]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>"])
    return tokenizer

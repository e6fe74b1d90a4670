"""Log-probabilities of tokens in the form of OpenAI's endpoints."""

from __future__ import annotations

from typing import Any

from ..generate.result import Candidate
from ..results import to_json
from .service import Service

__all__ = ["log_probs_of"]

# What stands for bytes of a character that is not complete.
_BROKEN = "\ufffd"


def log_probs_of(service: Service, candidate: Candidate, first: int = 0, *, is_chat: bool) -> dict[str, Any]:
    """The field `logprobs` of a choice.

    Args:
        service: knows the text of each token.
        candidate: that the artifact generated. While it grows, a token that ends within a character waits.
        first: the first token to show.
        is_chat: whether the choice is a message.
    """
    reader = service.engine.reader
    pieces = reader.pieces(candidate.tokens.tolist())
    while pieces and candidate.finish_reason is None and (not pieces[-1] or _BROKEN in pieces[-1]):
        pieces.pop()
    values = to_json(candidate.log_probs)
    entries = [_entry(piece, value) for piece, value in zip(pieces, values, strict=False)][first:]
    tops: list[list[dict[str, Any]]] = [[] for _ in entries]
    if candidate.top_tokens is not None and candidate.top_log_probs is not None:
        shown = slice(first, first + len(entries))
        likely = zip(candidate.top_tokens[shown].tolist(), to_json(candidate.top_log_probs[shown]), strict=True)
        tops = [[_entry(reader.pieces([i])[0], value) for i, value in zip(*row, strict=True)] for row in likely]
    if is_chat:
        return {
            "content": [entry | {"top_logprobs": top} for entry, top in zip(entries, tops, strict=True)],
            "refusal": None,
        }
    # As OpenAI's: the token that was drawn is among them, whether it was likely or not.
    likely_texts = [
        {other["token"]: other["logprob"] for other in [*top, entry]} for entry, top in zip(entries, tops, strict=True)
    ]
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": likely_texts if candidate.top_tokens is not None else None,
        "text_offset": None,
    }


def _entry(piece: str, value: float | None) -> dict[str, Any]:
    return {"token": piece, "logprob": value, "bytes": [*piece.encode("utf-8", "replace")]}

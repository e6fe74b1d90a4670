"""A request on its way from the ingress to a replica, and what its prompt begins with."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass

import msgspec
from starlette.types import Scope

__all__ = ["Forwarded", "prompt_key"]

# Where the endpoints have the text that a model reads first.
_FIELDS = ("prompt", "messages", "query", "text_1")


@dataclass(frozen=True)
class Forwarded:
    """A whole request.

    Attributes:
        scope: of ASGI, with plain values only.
        body: all of it.
        key: of its prompt; empty if it has none.
    """

    scope: Scope
    body: bytes
    key: bytes


class _Fields(msgspec.Struct):
    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    query: msgspec.Raw = msgspec.Raw()
    text_1: msgspec.Raw = msgspec.Raw()


class _Message(msgspec.Struct):
    role: object = None


def prompt_key(body: bytes) -> bytes:
    """What requests with the same prompt have in common; empty for a body without a prompt.

    Of messages, those up to the first of the user count: the turns of a conversation then have the same key.

    Args:
        body: JSON. An invalid one has no key: the replica that gets it says what is wrong.
    """
    try:
        fields = msgspec.json.decode(body, type=_Fields)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return b""
    value = next((raw for name in _FIELDS if (raw := bytes(getattr(fields, name)))), b"")
    if not value:
        return b""
    return hashlib.blake2b(_opening(value), digest_size=16).digest()


def _opening(value: bytes) -> bytes:
    """The JSON of the first messages; other values as they are."""
    opening = []
    with contextlib.suppress(msgspec.DecodeError):
        for message in msgspec.json.decode(value, type=list[msgspec.Raw]):
            opening.append(bytes(message))
            if msgspec.json.decode(message, type=_Message).role == "user":
                return b",".join(opening)
    return value

"""JSON as a type of msgspec's, safe from Ctrl-C.

msgspec looks up what a type is made of when it first meets it. If a signal's handler raises in the midst of that in the
main thread, the process may crash. Handlers run in no other thread.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

__all__ = ["decode_json"]

T = TypeVar("T")


def decode_json(text: bytes, kind: type[T]) -> T:
    """The value that a JSON text holds.

    Raises:
        msgspec.MsgspecError: it is not JSON, or not of this type.
    """
    with ThreadPoolExecutor(1, "bonnx-decode") as pool:
        return pool.submit(msgspec.json.decode, text, type=kind).result()

"""JSON decoded to a msgspec type, safe from Ctrl-C.

msgspec inspects a type on first use. If a signal handler raises during that, the process may crash; handlers run only
in the main thread, so another thread decodes.
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

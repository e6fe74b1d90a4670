"""What ends a completion: tokens, and texts that may reach over several tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Stops", "before_stop", "held_back"]


@dataclass(frozen=True)
class Stops:
    """What ends a completion.

    Attributes:
        tokens: ids, for the graph.
        texts: the texts among what the caller passed; a completion's text ends before them.
        in_text: whether one of the texts is more than one token, so that all are looked for in the text.
    """

    tokens: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    in_text: bool = False


def before_stop(text: str, stop_texts: Sequence[str], border: int) -> str | None:
    """What stands before the first stop text that ends behind `border`; None if there is none.

    Args:
        text: of a completion.
        stop_texts: what ends it.
        border: characters of the text that were there before the last token.
    """
    places = [text.find(stop, max(0, border - len(stop) + 1)) for stop in stop_texts]
    first = min((place for place in places if place >= 0), default=None)
    return None if first is None else text[:first]


def held_back(text: str, stop_texts: Sequence[str]) -> int:
    """How many characters at the end of a growing text may be the beginning of a stop text."""
    longest = 0
    for stop in stop_texts:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest

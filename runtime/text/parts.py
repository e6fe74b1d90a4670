"""Content in parts, passed to a chat template so that a template that expects a text is detected.

Such a template would write a list as Python shows it, or nothing at all. So parts record whether the template read
them, and refuse to become a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn, overload

__all__ = ["ContentParts", "TakesTextError", "joined", "lost_words", "was_read"]


class TakesTextError(Exception):
    """A template used content in parts as a text."""

    def __init__(self, role: str) -> None:
        super().__init__(role)
        self.role = role


class _ContentPart(dict[str, object]):
    """One part; refuses to be written as a whole, by `{{ part }}`."""

    def __init__(self, part: Mapping[str, object], role: str) -> None:
        super().__init__(part)
        self._role = role

    def __repr__(self) -> str:
        raise TakesTextError(self._role)


class ContentParts(Sequence[_ContentPart]):
    """A list of parts for a template, which records what was read.

    It is not a `list`, which `json` would read unnoticed. Names begin with `_` because templates cannot access these.
    """

    def __init__(self, parts: Sequence[Mapping[str, object]], role: str) -> None:
        self._parts, self._role = [_ContentPart(part, role) for part in parts], role
        self._unread, self._read = set(range(len(parts))), False

    def __len__(self) -> int:
        self._read |= not self._parts  # there is nothing more to read
        return len(self._parts)

    def __iter__(self) -> Iterator[_ContentPart]:
        self._read = True
        for place, part in enumerate(self._parts):
            self._unread.discard(place)
            yield part

    @overload
    def __getitem__(self, place: int) -> _ContentPart: ...

    @overload
    def __getitem__(self, place: slice) -> list[_ContentPart]: ...

    def __getitem__(self, place: int | slice) -> _ContentPart | list[_ContentPart]:
        part = self._parts[place]
        self._read = True
        places = range(len(self._parts))[place]
        self._unread -= set(places) if isinstance(places, range) else {places}
        return part

    def __contains__(self, value: object) -> bool:
        if isinstance(value, str):
            self._refuse()
        return value in self._parts

    def __repr__(self) -> str:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TakesTextError(self._role)


def joined(parts: Sequence[Mapping[str, object]]) -> str:
    """The texts of all parts, joined."""
    return "".join(str(part["text"]) for part in parts)


def was_read(parts: ContentParts) -> bool:
    """Whether the template read any part."""
    return parts._read


def lost_words(parts: ContentParts) -> bool:
    """Whether the template read some parts but not others."""
    return parts._read and bool(parts._unread)

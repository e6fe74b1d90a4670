"""What a server answers: completions in one JSON object, or chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from .completion import Completion

__all__ = ["Answer", "Assembly", "CompletionUsage", "read_answer"]


class CompletionUsage(msgspec.Struct):
    """Tokens, as the server counts them."""

    prompt_tokens: int
    completion_tokens: int = 0


class CompletionChoice(msgspec.Struct):
    """A choice, or a piece of it."""

    index: int | None = None
    text: str | None = None
    message: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None


class Answer(msgspec.Struct):
    """An answer, or a chunk of it. Servers disagree on whatever is not listed here."""

    choices: list[CompletionChoice] = []
    model: str | None = None
    usage: CompletionUsage | None = None
    error: Any = None


def read_answer(text: str | bytes) -> Answer:
    """Read an answer or a chunk.

    Raises:
        ValueError: it is not one.
    """
    return msgspec.json.decode(text, type=Answer)


class Assembly:
    """Puts completions together from answers or chunks.

    Args:
        chat: whether they are messages; else they are plain text.
    """

    def __init__(self, *, chat: bool) -> None:
        self._chat = chat
        self._texts: dict[int, list[str]] = {}
        self._messages: dict[int, dict[str, Any]] = {}
        self._ended: set[int] = set()

    def whole(self, answer: Answer) -> Iterator[Completion]:
        """The completions of an answer that is not streamed.

        Raises:
            ValueError: a choice lacks its text or message.
        """
        for place, choice in enumerate(answer.choices):
            if self._chat and choice.message is None:
                raise ValueError(f"choices[{place}] has no 'message'")
            if not self._chat and choice.text is None:
                raise ValueError(f"choices[{place}] has no 'text'")
            # Some servers give every choice the index 0.
            self._grow(place, choice.text, choice.message or {})
            yield self._complete(place, choice.finish_reason)

    def add(self, chunk: Answer) -> Iterator[Completion]:
        """Take in a chunk; the completions that it ends."""
        for choice in chunk.choices:
            index = choice.index or 0
            if index in self._ended:
                continue
            self._grow(index, choice.text, choice.delta or {})
            if choice.finish_reason is not None:
                yield self._complete(index, choice.finish_reason)

    def rest(self) -> Iterator[Completion]:
        """The completions of a stream that is over, but that did not say why they ended."""
        for index in sorted(set(self._texts) - self._ended):
            yield self._complete(index, None)

    def _grow(self, index: int, text: str | None, delta: Mapping[str, Any]) -> None:
        content = text if text is not None else delta.get("content")
        self._texts.setdefault(index, []).append(content if isinstance(content, str) else "")
        message = self._messages.setdefault(index, {})
        for key, value in delta.items():
            if key == "tool_calls":
                calls = message.setdefault(key, [])
                for place, piece in enumerate(value or ()):
                    number = piece.get("index", place)
                    calls += [{} for _ in range(number + 1 - len(calls))]
                    _join(calls[number], piece)
            elif key != "content" and value is not None:
                _join(message, {key: value})

    def _complete(self, index: int, reason: str | None) -> Completion:
        self._ended.add(index)
        text = "".join(self._texts.pop(index))
        message = self._messages.pop(index)
        if not self._chat:
            return Completion(text, None, reason)
        calls = message.pop("tool_calls", [])
        content: dict[str, Any] = {"content": text} if text or not calls else {}
        return Completion(
            text, {"role": "assistant", **message, **content, **({"tool_calls": calls} if calls else {})}, reason
        )


def _join(target: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Add a piece of a message or tool call: reasoning and arguments come in several, names and ids in one."""
    for key, value in piece.items():
        if isinstance(value, Mapping):
            _join(target.setdefault(key, {}), value)
        elif isinstance(value, str) and (key == "arguments" or key.startswith("reasoning")):
            target[key] = target.get(key, "") + value
        elif value is not None and key != "index":
            target[key] = value

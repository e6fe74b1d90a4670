"""What a server answers: completions in one JSON object, or chunk by chunk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from .completion import Completion
from .continuation import stopped_by

__all__ = ["Answer", "Assembly", "CompletionChoice", "read_answer"]


# Of one answer, a token each: 128 completions of 32,768 tokens.
_MOST_PIECES = 2**22


class CompletionChoice(msgspec.Struct):
    """A choice, or a piece of it."""

    index: int | None = None
    text: str | None = None
    message: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    finish_reason: str | None = None
    logprobs: Any = None
    stop_reason: Any = msgspec.UNSET
    matched_stop: Any = msgspec.UNSET

    @property
    def stopped_by(self) -> str | None:
        """As in `Completion`."""
        given = {"stop_reason": self.stop_reason, "matched_stop": self.matched_stop}
        return stopped_by({name: value for name, value in given.items() if value is not msgspec.UNSET})


class Answer(msgspec.Struct):
    """An answer, or a chunk of it. Servers disagree on whatever is not listed here."""

    choices: list[CompletionChoice] | None = None
    model: str | None = None
    usage: Any = None
    error: Any = None

    @property
    def tokens(self) -> tuple[int, int] | None:
        """Tokens of the prompt and of all completions so far; None if the server does not count them."""
        usage = self.usage if isinstance(self.usage, Mapping) else {}
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens") or 0
        if not isinstance(prompt, int | float) or not isinstance(completion, int | float):
            return None
        return int(prompt), int(completion)


def read_answer(text: str | bytes) -> Answer:
    """Read an answer or a chunk.

    Raises:
        ValueError: it is not one.
    """
    try:
        try:
            return msgspec.json.decode(text, type=Answer)
        except msgspec.DecodeError:
            # Half of a surrogate pair spoils one completion, not all: Python's reader takes it.
            if b"\\ud" not in (text.encode() if isinstance(text, str) else text).lower():
                raise
            return msgspec.convert(json.loads(text), Answer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class Assembly:
    """Puts completions together from answers or chunks.

    Args:
        chat: whether they are messages; else they are plain text.
    """

    def __init__(self, *, chat: bool) -> None:
        self._chat = chat
        self._texts: dict[int, list[str]] = {}
        self._messages: dict[int, dict[str, Any]] = {}
        self._log_probs: dict[int, dict[str, Any]] = {}
        self._ended: set[int] = set()
        self._pieces = 0

    def whole(self, answer: Answer) -> Iterator[tuple[int, Completion]]:
        """The completions of an answer that is not streamed, each with its number.

        Raises:
            ValueError: a choice lacks its text or message.
        """
        for place, choice in enumerate(answer.choices or ()):
            if self._chat and choice.message is None:
                raise ValueError(f"choices[{place}] has no 'message'")
            if not self._chat and choice.text is None:
                raise ValueError(f"choices[{place}] has no 'text'")
            # Some servers give every choice the index 0.
            self._grow(place, choice, choice.message or {})
            yield place, self._complete(place, choice.finish_reason or None, choice.stopped_by)

    def add(self, chunk: Answer) -> Iterator[tuple[int, Completion]]:
        """Take in a chunk; the completions that it ends, each with its number.

        Raises:
            ValueError: there are more pieces than any real answer has.
        """
        for choice in chunk.choices or ():
            index = choice.index or 0
            if index in self._ended:
                continue
            self._grow(index, choice, choice.delta or {})
            # Some servers send an empty reason until there is one.
            if choice.finish_reason:
                yield index, self._complete(index, choice.finish_reason, choice.stopped_by)

    def rest(self) -> Iterator[tuple[int, Completion]]:
        """The completions of a stream that is over, but that did not say why they ended."""
        for index in sorted(set(self._texts) - self._ended):
            yield index, self._complete(index, None, None)

    def _grow(self, index: int, choice: CompletionChoice, delta: Mapping[str, Any]) -> None:
        self._pieces += 1
        if self._pieces > _MOST_PIECES:
            raise ValueError(f"it has more than {_MOST_PIECES} pieces")
        self._texts.setdefault(index, []).append(_text(delta.get("content")) if choice.text is None else choice.text)
        if isinstance(choice.logprobs, dict):
            _extend(self._log_probs.setdefault(index, {}), choice.logprobs)
        message = self._messages.setdefault(index, {})
        _join(message, {key: value for key, value in delta.items() if key not in ("content", "tool_calls")})
        if pieces := delta.get("tool_calls"):
            if not isinstance(pieces, list) or not all(isinstance(piece, dict) for piece in pieces):
                raise ValueError("expected 'tool_calls' to be a list of objects")
            calls = message.setdefault("tool_calls", [])
            for place, piece in enumerate(pieces):
                _join(_call_of(calls, piece, place), piece)

    def _complete(self, index: int, reason: str | None, stopped_by: str | None) -> Completion:
        self._ended.add(index)
        text = "".join(self._texts.pop(index))
        message, log_probs = self._messages.pop(index), self._log_probs.pop(index, None)
        if not self._chat:
            return Completion(text, None, reason, stopped_by, log_probs)
        calls = message.pop("tool_calls", [])
        for call in calls:
            del call["index"]
        content: dict[str, Any] = {"content": text} if text or not calls else {}
        whole = {"role": "assistant", **message, **content, **({"tool_calls": calls} if calls else {})}
        return Completion(text, whole, reason, stopped_by, log_probs)


def _text(content: object) -> str:
    """The text of a message's content, which may be a list of parts."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "".join(text for text in texts if isinstance(text, str))


def _extend(target: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Add the log-probabilities of further tokens: lists with one entry for each."""
    for key, value in piece.items():
        known = target.get(key)
        if isinstance(value, list) and isinstance(known, list):
            known.extend(value)
        elif value is not None or key not in target:
            # A copy, since it grows.
            target[key] = [*value] if isinstance(value, list) else value


def _call_of(calls: list[dict[str, Any]], piece: Mapping[str, Any], place: int) -> dict[str, Any]:
    """The tool call that a piece belongs to, perhaps a new one.

    Some servers leave the index out, or give each call the same; some give each piece of a call another id.
    """
    number = piece.get("index")
    index = number if isinstance(number, int) else place
    call = next((call for call in reversed(calls) if call["index"] == index), None)
    if call is not None and _name(piece) and _name(call):
        ids = {call.get("id"), piece.get("id")}
        begins = len(ids) == 2 if None not in ids else number is None
    else:
        begins = call is None
    if begins:
        calls.append({"index": index})
    return calls[-1] if begins or call is None else call


def _name(call: Mapping[str, Any]) -> object:
    function = call.get("function")
    return function.get("name") if isinstance(function, dict) else None


def _join(target: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Add a piece of a message or tool call: reasoning and arguments come in several, names and ids in one."""
    for key, value in piece.items():
        known = target.get(key)
        if value is None or (key == "index" and known is not None):
            continue
        in_pieces = key in ("arguments", "refusal") or key.startswith("reasoning")
        if isinstance(value, dict) and isinstance(known, dict) and not in_pieces:
            _join(known, value)
        elif in_pieces and isinstance(value, str) and isinstance(known, str):
            target[key] = known + value
        elif in_pieces and isinstance(value, list) and isinstance(known, list):
            target[key] = [*known, *value]
        else:
            target[key] = value

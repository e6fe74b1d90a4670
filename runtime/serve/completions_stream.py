"""Answers of OpenAI's endpoints as server-sent events: chosen ones whole, a single completion as it comes."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import msgspec

from bonnx.errors import InputError, NoWinnerError

from ..generate.result import Generation
from ..upstream.events import CompletionChoice
from .batcher import DeadlineError
from .choosing import Chosen
from .completions_answer import completions_head
from .errors import encode, to_api_error
from .log_probs import log_probs_of
from .service import Service

__all__ = ["LiveCompletion", "completions_events"]


class LiveCompletion:
    """The one completion of a request, sent piece by piece; its score follows when it has ended.

    Args:
        service: gives the model's name and the text of tokens.
        is_chat: whether it is a message.
        log_probs: send the log-probability of each token.
    """

    def __init__(self, service: Service, *, is_chat: bool, log_probs: bool) -> None:
        self._service, self._is_chat, self._log_probs = service, is_chat, log_probs
        self._pieces: asyncio.Queue[dict[str, object] | None] = asyncio.Queue()
        self._text, self._tokens, self._reason = "", 0, "stop"
        self._head = completions_head(service, is_chat=is_chat)
        if is_chat:
            self._head["object"] = "chat.completion.chunk"

    def take_state(self, generation: Generation) -> None:
        """Take in what the artifact has generated so far."""
        (candidate,) = generation.candidates
        text = candidate.text or ""
        piece: dict[str, object] = {"logprobs": None}
        if self._log_probs:
            shown = log_probs_of(self._service, candidate, self._tokens, is_chat=self._is_chat)
            if added := len(shown["content"] if self._is_chat else shown["tokens"]):
                piece["logprobs"] = shown
                self._tokens += added
        new = text[len(self._text) :]
        if not new and piece["logprobs"] is None:
            return
        role = {} if self._text else {"role": "assistant"}
        piece |= {"delta": role | {"content": new}} if self._is_chat else {"text": new}
        self._text = text
        self._pieces.put_nowait(piece)

    def take_piece(self, piece: CompletionChoice) -> None:
        """Take in a piece that the upstream sent."""
        self._reason = piece.finish_reason or self._reason
        if piece.index:
            # It makes more completions than it was asked for.
            return
        if self._is_chat and piece.delta:
            # A copy: the pieces are put together in place.
            self._pieces.put_nowait({"delta": copy.deepcopy(piece.delta), "logprobs": piece.logprobs})
        elif not self._is_chat and piece.text:
            self._pieces.put_nowait({"text": piece.text, "logprobs": piece.logprobs})

    async def start(self, choosing: Coroutine[Any, Any, Chosen]) -> Chosen | None:
        """Start; return when the first piece is there: None, or the completion if it came whole.

        Raises:
            Exception: whatever `choosing` raises before the first piece.
        """
        self._task = asyncio.ensure_future(choosing)
        self._task.add_done_callback(lambda _: self._pieces.put_nowait(None))
        try:
            self._first = await self._pieces.get()
            return self._task.result() if self._first is None else None
        except BaseException:
            self._task.cancel()
            raise

    async def events(self, answer: Callable[[Chosen], Mapping[str, Any]], *, with_usage: bool) -> AsyncIterator[bytes]:
        """The pieces, and the end of `answer`, which is made from the completion when it has been scored."""
        try:
            piece = self._first
            while piece is not None:
                yield _event(self._head | {"choices": [{"index": 0, "finish_reason": None, **piece}]})
                piece = await self._pieces.get()
            for chunk in self._end(answer, with_usage=with_usage):
                yield _event(self._head | chunk)
            yield b"data: [DONE]\n\n"
        except Exception as e:
            error = to_api_error(e)
            if error is None:
                raise
            yield _event(msgspec.json.decode(error.response("/v1/").body))
        finally:
            self._task.cancel()

    def _end(self, answer: Callable[[Chosen], Mapping[str, Any]], *, with_usage: bool) -> list[dict[str, object]]:
        try:
            whole = answer(self._task.result())
            last, score, counted = _last_of(whole["choices"][0]), whole["bonnx"], whole.get("usage")
        except (NoWinnerError, InputError, DeadlineError) as e:
            # The client has the text already.
            warning = str(e) or "there was no time left to score it"
            last, score, counted = {"finish_reason": self._reason}, {"scores": [None], "warnings": [warning]}, None
        content: dict[str, object] = {"delta": {}} if self._is_chat else {"text": ""}
        end = {"index": 0, **last, "logprobs": None} | content
        if not with_usage:
            return [{"choices": [end], "bonnx": score}]
        usage = {} if counted is None else {"usage": counted}
        return [{"choices": [end]}, {"choices": [], "bonnx": score} | usage]


async def completions_events(answer: Mapping[str, Any], *, is_chat: bool, with_usage: bool) -> AsyncIterator[bytes]:
    """The answer as chunks: the choice is known only when all have been scored, so each comes whole."""
    kind = {"object": "chat.completion.chunk"} if is_chat else {}
    head = {key: answer[key] for key in ("id", "object", "created", "model")} | kind
    for place, choice in enumerate(answer["choices"], 1):
        end = {"index": choice["index"], **_last_of(choice), "logprobs": None}
        content = {name: value for name, value in choice.items() if name != "stop_reason"}
        if is_chat:
            message = content.pop("message")
            calls = [call | {"index": place} for place, call in enumerate(message.get("tool_calls", ()))]
            content["delta"] = message | ({"tool_calls": calls} if calls else {})
            end["delta"] = {}
        else:
            end["text"] = ""
        yield _event(head | {"choices": [content | {"finish_reason": None}]})
        # Many clients expect a choice in every chunk, unless they ask for the usage.
        is_last = place == len(answer["choices"]) and not with_usage
        yield _event(head | {"choices": [end]} | ({"bonnx": answer["bonnx"]} if is_last else {}))
    if with_usage:
        counted = {"usage": answer["usage"]} if "usage" in answer else {}
        yield _event(head | {"choices": [], "bonnx": answer["bonnx"]} | counted)
    yield b"data: [DONE]\n\n"


def _last_of(choice: Mapping[str, Any]) -> dict[str, object]:
    """What the last chunk of a choice says: why it ended."""
    return {name: choice[name] for name in ("finish_reason", "stop_reason") if name in choice}


def _event(value: Mapping[str, object]) -> bytes:
    return b"data: " + encode(value) + b"\n\n"

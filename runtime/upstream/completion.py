"""A completion from another program, and what came instead of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from ..results import Result

__all__ = ["Completion", "Failure", "Message"]

Message: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Completion(Result):
    """One completion of a prompt.

    Attributes:
        text: what it says; empty for a message that only calls tools.
        message: the assistant's message as the server wrote it; None for a completion of plain text.
        finish_reason: why it ended, in the server's words, such as `stop`, `length` or `tool_calls`.
        stopped_by: the stop text that ended it, empty if none did; None if the server does not say.
        log_probs: the field `logprobs` as the server wrote it; None if it was not asked for.
    """

    _optional: ClassVar[tuple[str, ...]] = ("stopped_by", "log_probs")

    _summary: ClassVar[tuple[str, ...]] = ("text", "finish_reason")

    text: str
    message: Message | None = None
    finish_reason: str | None = None
    stopped_by: str | None = None
    log_probs: Mapping[str, Any] | None = None

    @property
    def item(self) -> str | list[Message]:
        """The completion as `rank` takes a candidate: its text, or the message if it holds more than text."""
        calls_tools = self.message is not None and self.message.get("tool_calls")
        return [self.message] if self.message is not None and calls_tools else self.text


@dataclass(frozen=True)
class Failure:
    """A completion that did not come.

    Attributes:
        reason: what went wrong, without the key.
        status: the HTTP status of the upstream, or None if there was none.
    """

    reason: str
    status: int | None = None

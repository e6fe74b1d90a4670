"""The tools that a message calls, in a form in which equal calls are equal: what completions vote for."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from bonnx.errors import InputError

__all__ = ["reads_tools", "tool_answer", "tool_extractor"]

_TOOL = "tool"
_EXCEPT = "tool-except:"


def reads_tools(name: str) -> bool:
    """Whether an extractor's name stands for one that reads messages, not texts."""
    return name == _TOOL or name.startswith(_EXCEPT)


def tool_extractor(name: str) -> Callable[[object], str | None]:
    """The function that `tool` or `tool-except:FIELD,FIELD` stands for.

    Raises:
        InputError: no field is named.
    """
    if name == _TOOL:
        return tool_answer
    fields = {field.strip() for field in name.removeprefix(_EXCEPT).split(",")}
    if "" in fields:
        raise InputError(f"answers: expected 'tool-except:FIELD,FIELD', names of arguments to ignore; got {name!r:.60}")
    return lambda candidate: tool_answer(candidate, fields)


def tool_answer(candidate: object, ignored: Collection[str] = ()) -> str | None:
    """The calls of a candidate's last message: names and arguments, without ids; None if there are none to compare.

    Args:
        candidate: messages; a text calls nothing.
        ignored: names of arguments that do not count.
    """
    message = candidate[-1] if isinstance(candidate, list | tuple) and candidate else candidate
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not isinstance(calls, list | tuple) or not calls:
        return None
    try:
        return json.dumps([_call(call, ignored) for call in calls], sort_keys=True, ensure_ascii=False, default=str)
    except RecursionError:
        # Arguments nested thousands of levels deep are no answer.
        return None


def _call(call: object, ignored: Collection[str]) -> Any:
    """Name and arguments of one call."""
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping):
        return function
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            # As the model wrote it; not JSON, but perhaps equal to another's.
            arguments = arguments.strip()
    if isinstance(arguments, Mapping):
        arguments = {key: value for key, value in arguments.items() if key not in ignored}
    return [function.get("name"), _plain(arguments)]


def _plain(value: object) -> object:
    """A value in which 1 and 1.0 are equal."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value

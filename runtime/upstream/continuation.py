"""Ask a server for the next step of a completion that it has begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from bonnx.errors import InputError

from ..checks import is_list, shown

__all__ = ["CONTINUES", "continued", "continued_body", "stopped_by"]

CONTINUES: Mapping[str, object] = {"add_generation_prompt": False, "continue_final_message": True}
"""Fields by which vLLM, SGLang and llama.cpp continue the final message instead of beginning another."""


def continued(
    prompt: Any, sampling: Mapping[str, object], text: str, step: str | None, *, written: int = 0, greedy: bool = False
) -> tuple[Any, dict[str, object]]:
    """The prompt and the other fields of the request that continues a completion.

    Args:
        prompt: text or messages.
        sampling: other fields of the request.
        text: of the completion so far; empty before its first step.
        step: the text that ends a step, and with it the answer; None to go on to the completion's end.
        written: number of tokens in `text`, by which the maximum number is lowered; 0 if it is unknown.
        greedy: ask for the most likely tokens.

    Raises:
        InputError: `stop` in `sampling` is not a text or a list of texts.
    """
    fields = dict(sampling)
    if step is not None:
        fields["stop"] = [step, *_stops(sampling.get("stop"))]
    if greedy:
        fields["temperature"] = 0
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(most := fields.get(name), int):
            fields[name] = max(1, most - written)
    if not text:
        return prompt, fields
    if isinstance(prompt, str):
        return prompt + text, fields
    return [*prompt, {"role": "assistant", "content": text}], {**fields, **CONTINUES}


def continued_body(
    body: Mapping[str, object], text: str, step: str | None, *, written: int = 0, greedy: bool = False
) -> dict[str, object]:
    """As `continued`, for the body of a request."""
    key = "messages" if "messages" in body else "prompt"
    sampling = {name: value for name, value in body.items() if name != key}
    prompt, fields = continued(body[key], sampling, text, step, written=written, greedy=greedy)
    return {**fields, key: prompt}


def _stops(stop: object) -> Sequence[str]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not is_list(stops) or not all(isinstance(text, str) for text in cast(Sequence[object], stops)):
        raise InputError(f"stop: expected a text or a list of texts; got {shown(stop)}")
    return cast(Sequence[str], stops)


def stopped_by(choice: Mapping[str, object]) -> str | None:
    """The stop text that ended a choice, empty if none did; None if the server does not say.

    vLLM names it in `stop_reason`, SGLang in `matched_stop`: the text, or null or a token id for another end.
    """
    values = [choice[name] for name in ("stop_reason", "matched_stop") if name in choice]
    return next((value for value in values if isinstance(value, str)), "") if values else None

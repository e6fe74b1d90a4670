"""Answers in the form of OpenAI's endpoints."""

from __future__ import annotations

import math
import time
import uuid

from ..results import to_json
from .answer import warned
from .choosing import Chosen, Rule
from .log_probs import log_probs_of
from .service import Service

__all__ = ["completions_answer", "completions_head"]

# Reasons of bonnx, in OpenAI's words.
_REASONS = {"pruned": "stop", "deadline": "length"}


def completions_head(service: Service, *, is_chat: bool) -> dict[str, object]:
    """The first fields of an answer in OpenAI's form."""
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": service.name,
    }


def completions_answer(
    service: Service, chosen: Chosen, rule: Rule, n: int, *, is_chat: bool, log_probs: bool
) -> dict[str, object]:
    """The answer in OpenAI's form; the field `bonnx` holds what that form has no place for."""
    order = [i for i in chosen.standing.order if not math.isnan(chosen.scores[i])][:n]
    choices = [
        _choice(service, chosen, i, place, is_chat=is_chat, log_probs=log_probs) for place, i in enumerate(order)
    ]
    answer = completions_head(service, is_chat=is_chat) | {"choices": choices}
    if chosen.prompt_tokens is not None and chosen.completion_tokens is not None:
        total = chosen.prompt_tokens + chosen.completion_tokens
        counted = {"prompt_tokens": chosen.prompt_tokens, "completion_tokens": chosen.completion_tokens}
        answer["usage"] = {**counted, "total_tokens": total}
    answer["bonnx"] = {
        "scores": [float(chosen.scores[i]) for i in order],
        "margin": chosen.standing.margin,
        "method": rule.method,
        "aggregation": chosen.aggregation,
        "vote": rule.vote,
        "best_of": rule.best_of,
        "candidates": [_candidate(chosen, i, order) for i in range(len(chosen.completions))],
        "failures": [to_json(failure) for failure in chosen.failures],
        "cost": chosen.cost,
    } | warned([f"completions[{i}]: {reason}" for i, reason in sorted(chosen.unscored.items())])
    return answer


def _choice(
    service: Service, chosen: Chosen, i: int, place: int, *, is_chat: bool, log_probs: bool
) -> dict[str, object]:
    completion = chosen.completions[i]
    reason = _REASONS.get(completion.finish_reason or "", completion.finish_reason or "stop")
    choice: dict[str, object] = {"index": place, "finish_reason": reason, "logprobs": None}
    if completion.stopped_by is not None:
        # As vLLM says which stop text it was; null for another end.
        choice["stop_reason"] = completion.stopped_by or None
    if is_chat:
        choice["message"] = completion.message or {"role": "assistant", "content": completion.text}
    else:
        choice["text"] = completion.text
    if chosen.candidates and log_probs:
        choice["logprobs"] = log_probs_of(service, chosen.candidates[i], is_chat=is_chat)
    elif completion.log_probs is not None:
        choice["logprobs"] = completion.log_probs
    return choice


def _candidate(chosen: Chosen, i: int, order: list[int]) -> dict[str, object]:
    """A line for every completion; `choice` is where it stands among the choices."""
    entry: dict[str, object] = {"score": to_json(float(chosen.scores[i])), "choice": None}
    if i in order:
        entry["choice"] = order.index(i)
    entry["finish_reason"] = chosen.completions[i].finish_reason
    if chosen.standing.answers is not None:
        entry["answer"] = chosen.standing.answers[i]
    if chosen.standing.group_scores is not None:
        entry["group_score"] = to_json(float(chosen.standing.group_scores[i]))
    return entry

"""What the answers of several endpoints share."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import cast

from starlette.responses import Response, StreamingResponse

from bonnx.errors import InputError

from ..files.values import to_embeddings
from ..text.reader import Item
from .errors import ApiError, encode
from .schemas import Candidate, Message
from .service import Service

__all__ = ["answer_head", "check_model", "event_stream", "json_response", "to_runtime", "warned"]


def check_model(service: Service, model: str | None) -> None:
    """Refuse a request for another model.

    Raises:
        ApiError: 404.
    """
    name = service.name
    if model is not None and model != name:
        raise ApiError(404, f"model: this server has '{name}' only; got {model!r:.80}")


def answer_head(service: Service) -> dict[str, object]:
    """The first fields of an answer: its id and the model."""
    return {"id": uuid.uuid4().hex, "model": service.name}


def warned(warnings: list[str]) -> dict[str, object]:
    """The field `warnings`, if there are any."""
    return {"warnings": warnings} if warnings else {}


def to_runtime(value: Candidate, name: str) -> Item:
    """A prompt or candidate as `rank` takes it: messages as mappings, embeddings as an array.

    Args:
        value: as pydantic checked it.
        name: the field that errors name.

    Raises:
        InputError: lists of numbers that are not embeddings.
    """
    if isinstance(value, str):
        return value
    if value and isinstance(value[0], Message):
        return [message.model_dump(exclude_unset=True) for message in value]
    if value and isinstance(value[0], list):
        try:
            return to_embeddings(value)
        except InputError as e:
            raise InputError(f"{name}: {e}") from e
    return cast(Item, value)


def event_stream(events: AsyncIterator[bytes]) -> Response:
    """An answer as server-sent events, which no proxy holds back."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, 200, headers, "text/event-stream")


def json_response(value: object) -> Response:
    """An answer as JSON; null for NaN."""
    return Response(encode(value), media_type="application/json")

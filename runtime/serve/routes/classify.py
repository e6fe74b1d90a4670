"""`/v1/classify` and `/v1/pooling`: scores of whole texts or conversations, as vLLM's clients ask for them."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from bonnx.errors import InputError

from ...arrays import Array
from ...checks import ArgumentNames
from ...results import to_json
from ...text.reader import Item
from ..answer import check_model, json_response, to_runtime, warned
from ..rows import ScoredRows, label_name, score_rows
from ..schemas import FAIL_FAST, MOST_ITEMS, RAW_SCORES, Messages, RequestBody, Text, Tokens
from ..service import Service

__all__ = ["add"]

_NOUNS = ("prompt", "input", "inputs")
_NOT_CUT = "inputs are never cut; leave it out, and send inputs that fit"


class RowsBody(RequestBody):
    """What both endpoints take."""

    elsewhere: ClassVar[dict[str, str]] = {
        "truncate_prompt_tokens": _NOT_CUT,
        "truncation_side": _NOT_CUT,
        "priority": "requests run in the order in which they come; leave it out",
        "dimensions": "a score has one; leave it out",
        "chat_template": "the artifact's own is used; leave it out",
        "activation": RAW_SCORES,
        "use_activation": RAW_SCORES,
        "softmax": RAW_SCORES,
    }
    model: str | None = None
    input: (
        Text
        | Annotated[list[Text], FAIL_FAST, Field(min_length=1, max_length=MOST_ITEMS)]
        | Annotated[Tokens, Field(min_length=1)]
        | Annotated[list[Tokens], FAIL_FAST, Field(min_length=1, max_length=MOST_ITEMS)]
        | None
    ) = Field(None, description="expected a text, token ids, or a list of texts or of token ids")
    messages: Messages | None = Field(None, min_length=1, description="expected a list of messages: one conversation")
    user: str | None = Field(None, description="has no effect")
    request_id: str | None = Field(None, description="has no effect")


class PoolingBody(RowsBody):
    """Which scores, and how they are written."""

    task: Literal["classify", "token_classify"] | None = Field(
        None,
        description="classify: one score for each input; token_classify: one for each token; by default as the "
        "artifact's rule reads them, one token or several",
    )
    encoding_format: Literal["float", "base64"] = "float"


def add(routes: APIRouter, service: Service) -> None:
    """Declare the endpoints."""

    async def classify(request: Request, body: RowsBody) -> Response:
        """Score texts or a conversation as a classifier of one class, as vLLM's server does."""
        scored = await _score(service, request, body)
        label = label_name(service)
        data = [
            {"index": i, "label": label, "probs": [score], "num_classes": 1} for i, score in enumerate(scored.scores)
        ]
        return json_response(_answer(service, "classify", data, scored))

    async def pooling(request: Request, body: PoolingBody) -> Response:
        """Score texts or a conversation, as a whole or at every token, as vLLM's server does for reward models."""
        scored = await _score(service, request, body)
        reads_last = service.engine.manifest.scoring.aggregation == "last"
        task = body.task or ("classify" if reads_last else "token_classify")
        arrays = [np.array([score], np.float32) for score in scored.scores]
        if task == "token_classify":
            arrays = [scores[:, None] for scores in scored.token_scores]
        data = [
            {"index": i, "object": "pooling", "data": _written(array, body.encoding_format)}
            for i, array in enumerate(arrays)
        ]
        return json_response(_answer(service, "pool", data, scored))

    for endpoint in (classify, pooling):
        name = endpoint.__name__
        for path in (f"/v1/{name}", f"/{name}"):
            routes.post(path, name=name, include_in_schema=path.startswith("/v1"))(endpoint)


async def _score(service: Service, request: Request, body: RowsBody) -> ScoredRows:
    check_model(service, body.model)
    if (body.input is None) == (body.messages is None):
        raise InputError(f"expected either input or messages; got {'neither' if body.input is None else 'both'}")
    items, names = _rows(body)
    return await score_rows(service, request, items, names)


def _rows(body: RowsBody) -> tuple[Sequence[Item], ArgumentNames]:
    """The rows, and their names in errors."""
    if body.messages is not None:
        return [to_runtime(body.messages, "messages")], ArgumentNames("prompt", "messages", _NOUNS, ["messages"])
    assert body.input is not None
    if isinstance(body.input, str) or isinstance(body.input[0], int):
        return [body.input], ArgumentNames("prompt", "input", _NOUNS, ["input"])
    return list(body.input), ArgumentNames("prompt", "input", _NOUNS)


def _written(scores: Array, encoding: str) -> object:
    """Scores as numbers, or the bytes of float32 numbers, little-endian, in base64."""
    return to_json(scores) if encoding == "float" else base64.b64encode(scores.astype("<f4").tobytes()).decode()


def _answer(service: Service, prefix: str, data: list[dict[str, object]], scored: ScoredRows) -> dict[str, object]:
    head: dict[str, object] = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
    rest: dict[str, object] = {"model": service.name, "data": data, "usage": scored.usage.to_dict()}
    return head | rest | warned(scored.warnings)

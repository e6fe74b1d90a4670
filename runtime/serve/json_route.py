"""Routes whose body is JSON, read strictly before FastAPI sees it."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from ..files.strict_json import DECODER, json_error
from .errors import ApiError

__all__ = ["JsonRoute", "parse_json"]


class JsonRoute(APIRoute):
    """A route whose body is read strictly, before FastAPI looks at it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            if request.method == "POST":
                value = _read_json(await request.body(), request.headers.get("content-type"))
                return await handle(_Read(request, value))
            return await handle(request)

        return read


class _Read(Request):
    """A request whose body has been read."""

    def __init__(self, request: Request, value: object) -> None:
        super().__init__(request.scope, request.receive)
        self._value = value

    async def body(self) -> bytes:
        # FastAPI only asks whether there is one.
        return b" "

    async def json(self) -> object:
        return self._value


def _read_json(body: bytes, content_type: str | None) -> object:
    """The value of a body whose content type is JSON.

    Raises:
        ApiError: 415 for another content type, 400 as `parse_json`.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        got = repr(content_type)[:80] if content_type else "none"
        raise ApiError(415, f"expected a JSON object as the body, with Content-Type: application/json; got {got}")
    return parse_json(body)


def parse_json(body: bytes) -> object:
    """The value of a body.

    Args:
        body: UTF-8, with or without a byte order mark.

    Raises:
        ApiError: 400 for what `strict_json` refuses.
    """
    if not body.strip():
        raise ApiError(400, "expected a JSON object as the body; it is empty")
    try:
        return DECODER.decode(body.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise ApiError(400, f"the body is not JSON: expected UTF-8; byte {e.start} is not") from e
    except json.JSONDecodeError as e:
        raise ApiError(400, f"the body is not JSON: {e.msg} (line {e.lineno}, column {e.colno})") from e
    except (ValueError, RecursionError) as e:
        raise ApiError(400, f"the body is not JSON that can be read: {json_error(e)}") from e

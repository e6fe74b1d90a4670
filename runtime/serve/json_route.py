"""JSON bodies, read strictly: what is not JSON, or what two readers would read in two ways, is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from .errors import Problem

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

    def __init__(self, request: Request, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._value = value

    async def body(self) -> bytes:
        # All that is asked of it is whether there is one.
        return b" "

    async def json(self) -> Any:
        return self._value


def _read_json(body: bytes, content_type: str | None) -> Any:
    """The value of a body whose content type is JSON.

    Raises:
        Problem: 415 for another content type, 400 as `parse_json`.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        got = repr(content_type)[:80] if content_type else "none"
        raise Problem(415, f"expected a JSON object as the body, with Content-Type: application/json; got {got}")
    return parse_json(body)


def parse_json(body: bytes) -> Any:
    """The value of a body.

    Args:
        body: UTF-8, with or without a byte order mark.

    Raises:
        Problem: 400 for what is not JSON, an object that has a name twice, or a number that no 64-bit float holds.
    """
    if not body.strip():
        raise Problem(400, "expected a JSON object as the body; it is empty")
    try:
        return _DECODER.decode(body.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise Problem(400, f"the body is not JSON: expected UTF-8; byte {e.start} is none") from e
    except json.JSONDecodeError as e:
        raise Problem(400, f"the body is not JSON: {e.msg} (line {e.lineno}, column {e.colno})") from e
    except RecursionError as e:
        raise Problem(400, "the body is nested too deeply") from e
    except ValueError as e:
        # Python converts no whole number of thousands of digits.
        raise Problem(400, "a whole number in the body has too many digits") from e


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise Problem(400, f"the body has {twice!r:.80} twice in one object; expected it once")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise Problem(400, f"a number in the body is out of range: {digits:.40}")
    return value


def _constant(name: str) -> NoReturn:
    raise Problem(400, f"the body is not JSON: {name} is no number there")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_float, parse_constant=_constant)

"""Errors in the form that clients of the API expect, without paths or traces."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bonnx.errors import ArtifactError, InputError, NoWinnerError, UpstreamError

from .batcher import DeadlineError, QueueFullError

__all__ = ["ApiError", "encode", "respond", "to_api_error"]

_TYPES = {
    400: "invalid_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    415: "unsupported_media_type",
    422: "no_winner",
    429: "overloaded",
    500: "internal_error",
    502: "upstream_error",
    503: "unavailable",
    504: "deadline_exceeded",
}


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: for the client: what was expected, what was sent.
        headers: more headers of the answer.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}

    def response(self, path: str) -> Response:
        """The answer: the Open Inference Protocol has a text, Cohere `message`, Jina `detail`, OpenAI an object."""
        body: dict[str, object]
        if path.startswith("/v2/") and not path.endswith("/rerank"):
            body = {"error": self.message}
        else:
            error = {"message": self.message, "type": _TYPES.get(self.status, "error"), "code": self.status}
            body = {"message": self.message, "error": error}
            if path.endswith("/rerank"):
                body["detail"] = self.message
        return Response(encode(body), self.status, self.headers, "application/json")


def encode(value: object) -> bytes:
    """JSON; what is not finite becomes null, half of a surrogate pair becomes the replacement character."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return msgspec.json.encode(_without_surrogates(value))


def _without_surrogates(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list | tuple) else value


def to_api_error(error: Exception) -> ApiError | None:
    """The answer to an error that the client can act on; None for any other."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, ArtifactError):
        return ApiError(503, "the model's files were changed while it was served; restart this server")
    if isinstance(error, NoWinnerError):
        return ApiError(422, str(error))
    if isinstance(error, UpstreamError):
        # The client's own mistakes; what is wrong with the key or the address is the server's.
        return ApiError(error.status if error.status in (400, 404, 413, 422, 429) else 502, str(error))
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), {"Retry-After": str(error.retry_after)})
    if isinstance(error, DeadlineError):
        return ApiError(504, "the request timed out before its answer was ready; try again, or allow more time")
    return None


async def respond(request: Request, error: Exception) -> Response:
    """An exception handler."""
    problem = to_api_error(error)
    assert problem is not None
    return problem.response(request.url.path)

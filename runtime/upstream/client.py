"""Sample completions from a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, Ollama, a vendor.

One request asks for all completions, so that the server reads the prompt once. Many servers ignore `n` or refuse it;
the completions that are missing are then asked for one by one. Answers are streamed: each completion is there when it
ends, and those that have ended survive a broken connection.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from bonnx.errors import InputError

from ..checks import check_whole
from .background import wait_for
from .completion import Completion, Failure
from .cost import RequestCost, SamplingCost
from .events import Answer, Assembly, CompletionChoice, read_answer
from .requests import RequestError, Requests
from .settings import UpstreamSettings

try:
    import httpx
except ModuleNotFoundError as e:
    raise InputError(f"an upstream needs {e.name}, which is not installed; run `pip install bonnx[upstream]`") from e

# After the packages that it needs are known to be there.
from .connections import Connections
from .reading import read_events, read_whole

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Upstream"]

_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}
_MOST_SHOWN = 200
_CONNECT_TIMEOUT = 10.0


class _UsageRefusedError(Exception):
    """The server does not take `stream_options`."""


class Upstream:
    """A client of one server, safe to share between threads, tasks and event loops.

    Its connections stay open from call to call. Leaving a `with` or `async with` block closes them, as `close` and
    `aclose` do.

    Args:
        url: base address of the server, such as `http://localhost:8000/v1`.
        model: the model that requests name; None if the caller names one.
        api_key: sent to this address only, and never shown; None for none.
        concurrency: maximum number of requests that are open at once.
        retries: how often a request is repeated after status 429 or 5xx or a broken connection.
        timeout: seconds to wait for the next bytes of an answer.

    Raises:
        InputError: an argument is invalid.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        concurrency: int = 16,
        retries: int = 3,
        timeout: float = 120.0,
    ) -> None:
        self.settings = UpstreamSettings(url, model, api_key, concurrency, retries, timeout)
        # How many completions the server has made in one request, and how many it makes at most; None until known.
        self.makes_at_once: int | None = None
        self.at_most: int | None = None
        self._reports_usage = True
        self._connections = Connections(self._make_client, concurrency)

    def __repr__(self) -> str:
        return f"<bonnx.Upstream {self.settings.url} {self.settings.model or ''}>"

    def close(self) -> None:
        """Close the connections that were opened for code that is not async."""
        wait_for(self.aclose())

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        await self._connections.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def sample(
        self,
        body: Mapping[str, object],
        n: int,
        *,
        first: int = 0,
        until: float | None = None,
        cost: SamplingCost | None = None,
        on_piece: Callable[[CompletionChoice], object] | None = None,
    ) -> AsyncGenerator[Completion | Failure, None]:
        """Completions of one prompt, each when it ends, and a `Failure` for each that does not come.

        Leaving the iteration cancels the requests that are open.

        Args:
            body: of the request, with `messages` or `prompt`; `n`, `stream` and `stream_options` are set here.
            n: number of completions.
            first: number of the first completion: how many of this prompt were sampled before. A `seed` in `body` is
                raised by the number of the first completion of each request, since equal seeds would give equal
                completions.
            until: deadline on the clock of `time.monotonic`.
            cost: what to add the cost to.
            on_piece: called with each piece of a completion as it comes, if the server streams; only for an `n` of 1.
                A request that breaks after a piece is not repeated, since the pieces would come again.

        Raises:
            InputError: `n` is not a number of completions, or the body has not one of `messages` and `prompt`.
        """
        check_whole("n", n, 1)
        if ("messages" in body) == ("prompt" in body):
            raise InputError("expected either 'messages' or 'prompt' in the body of an upstream's request")
        try:
            json.dumps({**body}, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as e:
            raise InputError(f"the body of an upstream's request cannot be written as JSON: {_line(str(e))}") from e
        requests = Requests(self, dict(body), until, SamplingCost() if cost is None else cost, on_piece)
        async with contextlib.aclosing(requests.run(range(first, first + n))) as arrivals:
            async for arrival in arrivals:
                yield arrival

    async def send(
        self,
        body: dict[str, object],
        cost: SamplingCost,
        on_piece: Callable[[CompletionChoice], object] | None = None,
    ) -> AsyncIterator[tuple[int, Completion]]:
        """The completions of one request and their numbers, each when it ends; its pieces go to `on_piece` before.

        Raises:
            RequestError: the upstream refused the request, failed or did not answer with completions.
        """
        try:
            async for completion in self._send(body, cost, on_piece):
                yield completion
        except _UsageRefusedError:
            self._reports_usage = False
            async for completion in self._send(body, cost, on_piece):
                yield completion

    async def _send(
        self,
        body: dict[str, object],
        cost: SamplingCost,
        on_piece: Callable[[CompletionChoice], object] | None,
    ) -> AsyncIterator[tuple[int, Completion]]:
        """Send a request once."""
        chat, asks_usage = "messages" in body, self._reports_usage
        body = {**body, "stream": True}
        body.pop("stream_options", None)
        if self.settings.model is not None:
            body.setdefault("model", self.settings.model)
        if asks_usage:
            body["stream_options"] = {"include_usage": True}
        url = self.settings.url + ("/chat/completions" if chat else "/completions")
        try:
            client, open_requests = await self._connections.open()
            async with open_requests, client.stream("POST", url, json=body) as response:
                cost.requests += 1
                await self._check(response, asks_usage=asks_usage)
                async for completion in self._read(response, cost, on_piece, chat=chat):
                    yield completion
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            detail = self._safe_line(_why(e, self.settings.timeout))
            raise RequestError(f"the connection to {self.settings.url} failed: {detail}") from e

    def _safe_line(self, text: str) -> str:
        """A text in one line; some servers repeat the key in their errors."""
        key = self.settings.api_key
        return _line(text.replace(key, "***") if key else text)

    def _make_client(self) -> httpx.AsyncClient:
        key = self.settings.api_key
        try:
            return httpx.AsyncClient(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(self.settings.timeout, connect=_CONNECT_TIMEOUT, pool=None),
                limits=httpx.Limits(max_connections=None),
                # A redirect would carry the key to another address.
                follow_redirects=False,
                trust_env=True,
            )
        except (ValueError, ImportError) as e:
            reason = f"the proxy that the environment names cannot be used: {self._safe_line(str(e))}"
            raise RequestError(reason, final=True) from e

    async def _check(self, response: httpx.Response, *, asks_usage: bool) -> None:
        """Refuse an answer that is not completions."""
        if response.status_code == 200:
            return
        status = response.status_code
        body = (await read_whole(response, is_error=True)).decode("utf-8", "replace")
        if status in (400, 422) and asks_usage and "stream_options" in body:
            raise _UsageRefusedError
        try:
            detail = self._safe_line(_reason(json.loads(body)))
        except (ValueError, RecursionError):
            detail = self._safe_line(body)
        reason = f"the upstream answered {status}: {detail}"
        raise RequestError(reason, status=status, final=status not in _RETRIED, pause=_retry_after(response))

    async def _read(
        self,
        response: httpx.Response,
        cost: SamplingCost,
        on_piece: Callable[[CompletionChoice], object] | None,
        *,
        chat: bool,
    ) -> AsyncIterator[tuple[int, Completion]]:
        """The completions of an answer and their numbers, each when it ends."""
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        assembly, request_cost = Assembly(chat=chat), RequestCost(cost)
        try:
            if kind == "text/event-stream":
                async for data in read_events(response):
                    is_last = data.strip() == "[DONE]"
                    chunk = Answer() if is_last else self._take(data, cost, request_cost)
                    if on_piece is not None:
                        for choice in chunk.choices or ():
                            on_piece(choice)
                    for completion in assembly.rest() if is_last else assembly.add(chunk):
                        yield completion
                return
            body = await read_whole(response, is_error=kind != "application/json")
            if kind == "application/json":
                # It does not stream.
                for completion in assembly.whole(self._take(body, cost, request_cost)):
                    yield completion
                return
        except ValueError as e:
            raise RequestError(
                f"the upstream's answer is not completions: {self._safe_line(str(e))}", final=True
            ) from e
        raise RequestError(
            f"expected JSON or server-sent events from {self.settings.url}; got {kind or 'no content type'}: "
            f"{self._safe_line(body.decode('utf-8', 'replace'))}; check the address",
            final=True,
        )

    def _take(self, text: str | bytes, cost: SamplingCost, request_cost: RequestCost) -> Answer:
        """Read a part of an answer; some servers send an error with status 200, or in the middle of a stream."""
        answer = read_answer(text)
        if answer.error:
            reason = self._safe_line(_reason({"error": answer.error}))
            raise RequestError(f"the upstream answered with an error: {reason}")
        cost.model = answer.model or cost.model
        if answer.tokens is not None:
            request_cost.count(*answer.tokens)
        return answer


def _reason(body: object) -> str:
    """What an error's body says."""
    error = body.get("error", body) if isinstance(body, Mapping) else body
    text = error.get("message") or error.get("detail") if isinstance(error, Mapping) else error
    return str(body if text is None else text)


def _line(text: str) -> str:
    """The beginning of a text, in one line."""
    return " ".join(text.split())[:_MOST_SHOWN] or "an empty body"


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait for, as a number or until a date; None if it does not say."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, TypeError):
            return None
        # Without a zone, it is in UTC.
        zone = date.tzinfo or timezone.utc
        seconds = (date.replace(tzinfo=zone) - datetime.now(zone)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _why(error: Exception, timeout: float) -> str:
    """Why a connection failed, and what to do."""
    text = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectTimeout):
        return f"it could not be made in {_CONNECT_TIMEOUT:g} s"
    if isinstance(error, httpx.ReadTimeout):
        return f"nothing came for {timeout:g} s"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"the variable SSL_CERT_FILE may name the certificates to trust: {text}"
    if "SSL" in text or isinstance(error, httpx.RemoteProtocolError):
        return f"check the address, also whether it begins with http or https: {text}"
    return text

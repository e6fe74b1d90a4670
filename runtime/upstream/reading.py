"""The bytes that a server sends, no more of them than one answer can need."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

__all__ = ["read_events", "read_whole"]

# A whole answer, or the text of one event; the largest real ones are a few MiB.
MOST_BYTES = 64 * 2**20
# More of an error's body is not shown anyway.
MOST_ERROR_BYTES = 64 * 2**10


async def read_whole(response: httpx.Response, *, is_error: bool = False) -> bytes:
    """The body of an answer; of an error only the beginning.

    Raises:
        ValueError: it is too long.
    """
    body = bytearray()
    async for part in response.aiter_bytes():
        body += part
        if is_error and len(body) > MOST_ERROR_BYTES:
            break
        if len(body) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
    return bytes(body)


async def read_events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each server-sent event that has some.

    Raises:
        ValueError: an event is too long, or is not UTF-8.
    """
    data: list[bytes] = []
    size = 0
    async for line in _lines(response):
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
            size += len(line)
            if size > MOST_BYTES:
                raise ValueError(f"an event has more than {MOST_BYTES} bytes")
        elif not line and data:
            yield b"\n".join(data).decode()
            data, size = [], 0
    # Some servers leave out the empty line at the end.
    if data:
        yield b"\n".join(data).decode()


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines as events have them: they end with LF, CR LF or CR, and with nothing else."""
    rest = bytearray()
    async for part in response.aiter_bytes():
        # A CR at the end may be one half of CR LF.
        seen = len(rest) - (1 if rest.endswith(b"\r") else 0)
        rest += part
        if b"\n" in rest[seen:] or b"\r" in rest[seen:-1]:
            held = b"\r" if rest.endswith(b"\r") else b""
            whole = bytes(rest[: len(rest) - len(held)]).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            *lines, last = whole.split(b"\n")
            rest = bytearray(last + held)
            for line in lines:
                yield line
        if len(rest) > MOST_BYTES:
            raise ValueError(f"a line has more than {MOST_BYTES} bytes")
    for line in bytes(rest).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"):
        yield line

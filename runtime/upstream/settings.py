"""Where the upstream is, and how patient to be with it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from bonnx.errors import InputError

from ..checks import check_number, check_whole, shown

__all__ = ["UpstreamSettings"]


@dataclass(frozen=True)
class UpstreamSettings:
    """The arguments of `Upstream`, checked."""

    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 16
    retries: int = 3
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if not isinstance(self.url, str):
            raise InputError(f"url: expected the address of a server; got {shown(self.url)}")
        try:
            parts = urlsplit(self.url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            # A port above 65535, or half of an IPv6 address.
            is_address = False
        if not is_address:
            raise InputError(f"url: expected an address such as http://localhost:8000/v1; got {self.url!r:.100}")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InputError("url: expected an address without user, password, query and fragment; pass the key apart")
        object.__setattr__(self, "url", self.url.rstrip("/"))
        check_whole("concurrency", self.concurrency, 1)
        check_whole("retries", self.retries, 0)
        check_number("timeout", self.timeout, "seconds", gt=0)
        if self.api_key is not None:
            check_key(self.api_key)


def check_key(key: object) -> str:
    """A key that can stand in an HTTP header.

    Raises:
        InputError: it cannot; the key is not shown.
    """
    if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise InputError("api_key: expected one line of ASCII characters, not empty, without spaces around it")
    return key


def read_key(file: str | os.PathLike[str] | None, variable: str = "OPENAI_API_KEY") -> str | None:
    """The key of an upstream: the first line of a file, else an environment variable; None if there is neither.

    Raises:
        InputError: the file cannot be read, or what it holds is not a key.
    """
    if file is None:
        return check_key(key.strip()) if (key := os.environ.get(variable)) else None
    try:
        return check_key(Path(file).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"the key's file {os.fspath(file)} cannot be read: {e}") from e

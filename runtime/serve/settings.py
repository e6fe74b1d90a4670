"""The limits of a server."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from bonnx.errors import InputError

from ..checks import check_whole
from ..engine.engine import PROMPT_CACHE
from ..upstream.settings import UpstreamSettings

__all__ = ["Settings"]


def _half_of_memory() -> int:
    """Half of the machine's memory in bytes, or 4 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The limits of a server: sizes in bytes or tokens, times in seconds.

    Raises:
        InputError: a value is invalid; it is named.
    """

    api_key: str | None = None
    """The key that clients must send as `Authorization: Bearer ...`; None for no key."""
    max_body: int = 4 * 2**20
    """Maximum size of a request's body; checked before it is read."""
    max_buffered: int = 256 * 2**20
    """Maximum sum of the bodies that are being read or processed."""
    max_tokens: int = 65536
    """Maximum size of a request, including padding and everything that it may generate."""
    body_timeout: float = 10.0
    """Maximum time for a body to arrive."""
    timeout: float = 30.0
    """Maximum time for a request; a client may set less in `X-Request-Timeout`."""
    max_queue: int = 256
    """Maximum number of requests that wait for each of the batchers `rank` and `generate`; further ones get 429."""
    max_searches: int = 8
    """Maximum number of searches by the artifact that run at once."""
    batch_wait: float = 0.0
    """Time that a request waits for others while the model is idle. At 0 it waits a tenth of the last run's time, and
    only if more requests are likely."""
    batch_tokens: int = 2048
    """Maximum size of rankings that run together, including padding."""
    batch_candidates: int = 128
    """Maximum number of candidates that grow in one batch."""
    generation_memory: int = dataclasses.field(default_factory=_half_of_memory)
    """Maximum size of the keys and values of all generations that run at once, if they grow to their limits; by default
    half of the machine's memory."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may call the server, such as `https://example.org`; `*` is every one."""
    model_name: str | None = None
    """How clients name the model; None for the artifact's name."""
    best_of: int = 16
    """Completions to sample for a chat or text completion that does not say."""
    prompt_cache: int = PROMPT_CACHE
    """Maximum size of the keys and values of prompts, and of what prompts begin with, that are kept; 0 for none."""
    upstream: UpstreamSettings | None = None
    """The server that completions are sampled from; None to generate with the artifact."""

    def __post_init__(self) -> None:
        for name in (
            "max_body",
            "max_buffered",
            "max_tokens",
            "max_queue",
            "max_searches",
            "generation_memory",
            "batch_tokens",
            "batch_candidates",
            "best_of",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: expected a whole number of at least 1; got {value!r}")
        check_whole("prompt_cache", self.prompt_cache, 0)
        for name, least in (("body_timeout", 0.001), ("timeout", 0.001), ("batch_wait", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e6:
                raise InputError(f"{name}: expected seconds, at least {least:g}; got {value!r}")
        if self.model_name is not None and not self.model_name:
            raise InputError("model_name: expected at least one character; got an empty name")
        if self.api_key is not None and not self.api_key:
            raise InputError("api_key: expected at least one character; got an empty key")

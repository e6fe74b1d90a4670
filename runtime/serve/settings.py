"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

from bonnx.errors import InputError

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Bounds of a server; sizes in bytes or tokens, times in seconds.

    Raises:
        InputError: a value is invalid; it is named.
    """

    api_key: str | None = None
    """What a client must send as `Authorization: Bearer ...`; None for no key."""
    max_body: int = 4 * 2**20
    """Maximum size of a request's body; checked before it is read."""
    max_buffered: int = 256 * 2**20
    """Maximum sum of the bodies that are being read or worked on."""
    max_tokens: int = 65536
    """Maximum size of a request, padding and all that it may generate included."""
    body_timeout: float = 10.0
    """How long a client may take to send its body."""
    timeout: float = 30.0
    """How long a request may take, if it does not ask for less in `X-Request-Timeout`."""
    max_queue: int = 256
    """Requests that may wait for each of the two batchers, ranking and generating; beyond it the answer is 429."""
    max_streams: int = 8
    """Generations that may be watched at once."""
    batch_wait: float = 0.0
    """How long a request waits for company when the model is idle; without it a tenth of the last run, and only for
    requests that are likely to come."""
    batch_tokens: int = 2048
    """Maximum size of rankings that run together, padding included."""
    batch_candidates: int = 128
    """Maximum number of candidates that are generated together."""
    batch_waste: float = 0.2
    """Maximum share of a joint run's tokens that may be padding."""

    def __post_init__(self) -> None:
        for name in (
            "max_body",
            "max_buffered",
            "max_tokens",
            "max_queue",
            "max_streams",
            "batch_tokens",
            "batch_candidates",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: expected a whole number of at least 1; got {value!r}")
        for name, least in (("body_timeout", 0.001), ("timeout", 0.001), ("batch_wait", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e6:
                raise InputError(f"{name}: expected seconds, at least {least:g}; got {value!r}")
        if not 0 <= self.batch_waste < 1:
            raise InputError(f"batch_waste: expected at least 0 and below 1; got {self.batch_waste!r}")
        if self.api_key is not None and not self.api_key:
            raise InputError("api_key: expected at least one character; got an empty key")

"""What the completions of one prompt cost."""

from __future__ import annotations

__all__ = ["RequestCost", "SamplingCost"]


class SamplingCost:
    """The cost of sampling, which grows while completions come.

    Attributes:
        prompt_tokens: of all requests, as the server counts them; None if it does not.
        completion_tokens: likewise.
        requests: how many were sent, retries included.
        model: as the server calls itself; None until it has answered.
    """

    def __init__(self) -> None:
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.requests = 0
        self.model: str | None = None

    def add(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Add what a request cost."""
        self.prompt_tokens = (self.prompt_tokens or 0) + prompt_tokens
        self.completion_tokens = (self.completion_tokens or 0) + completion_tokens

    def include(self, other: SamplingCost) -> None:
        """Add what a part of the sampling cost."""
        if other.prompt_tokens is not None:
            self.add(other.prompt_tokens, other.completion_tokens or 0)
        self.requests += other.requests
        self.model = other.model or self.model


class RequestCost:
    """The tokens of one request. Some servers count in every chunk, what came before included: the last count holds.

    Args:
        total: what to add them to.
    """

    def __init__(self, total: SamplingCost) -> None:
        self._total, self._counted = total, (0, 0)

    def count(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Take in what the server has counted so far."""
        prompt_before, completion_before = self._counted
        self._total.add(prompt_tokens - prompt_before, completion_tokens - completion_before)
        self._counted = prompt_tokens, completion_tokens

"""A ranking as the client requested it, and its outcome, under the names of the client's fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..checks import ARGUMENTS, ArgumentNames
from ..rank.request import RankRequest
from ..rank.result import Ranking
from ..text.reader import Item

__all__ = ["ClientRequest", "Outcome", "TokenUsage"]


@dataclass(frozen=True)
class ClientRequest:
    """One prompt and its candidates.

    Attributes:
        prompt: as the runtime takes it.
        candidates: as the runtime takes them.
        names: the fields of the client's request that hold them.
        instruction: of a reranker; None for the model's own.
    """

    prompt: Item
    candidates: Sequence[Item]
    names: ArgumentNames = ARGUMENTS
    instruction: str | None = None

    @property
    def characters(self) -> int:
        """Characters of all texts that are tokenized for it: the prompt is tokenized once with each candidate."""
        each = _characters(self.prompt) + len(self.instruction or "")
        return each * len(self.candidates) + sum(map(_characters, self.candidates))


@dataclass(frozen=True)
class TokenUsage:
    """The tokens of an answer.

    Attributes:
        prompt: tokens that were sent, each text as often as it was sent.
        completion: tokens that were generated.
        cut: tokens that were left out of the prompt.
    """

    prompt: int
    completion: int = 0
    cut: int = 0

    def __add__(self, other: TokenUsage) -> TokenUsage:
        return TokenUsage(self.prompt + other.prompt, self.completion + other.completion, self.cut + other.cut)

    def to_dict(self) -> dict[str, int]:
        """The field `usage` of an answer."""
        total = {"total_tokens": self.prompt + self.completion}
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, **total, "cut_tokens": self.cut}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a request.

    Attributes:
        ranking: None if no candidate can win.
        scores: one for each candidate, NaN for one that cannot win.
        warnings: why a candidate cannot win, under its name in the client's request.
        usage: the tokens of the request.
    """

    ranking: Ranking | None
    scores: list[float]
    warnings: list[str]
    usage: TokenUsage

    @classmethod
    def ranked(cls, ranked: ClientRequest, rank_request: RankRequest, ranking: Ranking) -> Outcome:
        """Of a ranking with a winner."""
        scores = [float(score) for score in ranking.candidate_scores]
        reasons = {i: ranking.unreadable.get(i, "its score is NaN") for i, score in enumerate(scores) if score != score}
        return cls(ranking, scores, _warnings(ranked, reasons), _usage(rank_request))

    @classmethod
    def lost(
        cls, ranked: ClientRequest, reasons: Mapping[int, str], rank_request: RankRequest | None = None
    ) -> Outcome:
        """Of a ranking without a winner."""
        scores = [float("nan")] * len(ranked.candidates)
        return cls(
            None, scores, _warnings(ranked, reasons), TokenUsage(0) if rank_request is None else _usage(rank_request)
        )


def _warnings(ranked: ClientRequest, reasons: Mapping[int, str]) -> list[str]:
    return [f"{ranked.names.candidate(i)}: {reason}" for i, reason in sorted(reasons.items())]


def _usage(rank_request: RankRequest) -> TokenUsage:
    # Where a candidate's first characters change the tokens at the prompt's end, the candidate's row holds them.
    prompt = len(rank_request.prompt) + max(rank_request.rows.skip)
    lengths = (len(item) - skip for item, skip in zip(rank_request.rows.items, rank_request.rows.skip, strict=True))
    return TokenUsage(prompt + sum(lengths), cut=rank_request.rows.cut)


def _characters(item: object) -> int:
    """Characters of a text, of all texts in messages or of a candidate's steps; 0 for numbers."""
    total, parts = 0, [item]
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            total += len(part)
        elif isinstance(part, Mapping):
            parts += part.values()
        elif isinstance(part, list | tuple) and not (part and isinstance(part[0], int | float)):
            parts += part
    return total

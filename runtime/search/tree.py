"""A prompt's completions as branches that grow, fork and end: every search method is written in these terms.

`ArtifactTree` generates with an artifact, token by token; `UpstreamTree` (`best_of_n/steps.py`) asks a server for one
step after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..arrays import Array

__all__ = ["B", "Branch", "Tree"]


@dataclass(eq=False)
class Branch:
    """A completion under way.

    Attributes:
        tokens: token ids that the network has read; none where another program generates.
        certainties: self-certainty of the distribution that each was drawn from, if it is computed.
        reason: an index into `FINISH_REASONS`, or -1 while it grows.
        node: index of the last piece that was judged, None before the first.
        begun: number of tokens in the pieces that were judged.
        group: free for the method, to sort its branches.
        void: it ended without a token of its own, as another fork of the same branch did: it is no candidate.
    """

    tokens: list[int] = field(default_factory=list)
    certainties: list[float] = field(default_factory=list)
    reason: int = -1
    node: int | None = None
    begun: int = 0
    group: int = 0
    void: bool = False

    @property
    def written(self) -> Hashable:
        """Equal for branches that say the same."""
        return tuple(self.tokens)


B = TypeVar("B", bound=Branch)


class Tree(ABC, Generic[B]):
    """The branches of one prompt.

    Attributes:
        answer_of: gives what a finished branch votes for, if it votes.
    """

    answer_of: Callable[[B], Hashable | None] | None = None

    @abstractmethod
    def roots(self, count: int) -> list[B]:
        """Branches that have not begun; none is returned twice."""

    @abstractmethod
    def fork(self, branch: B, count: int) -> list[B]:
        """The branch itself and `count - 1` others that continue from the same place, each with its own draw."""

    @abstractmethod
    def look_ahead(self, branches: Sequence[B], steps: int) -> list[B]:
        """Copies of the branches, grown by `steps` steps of the most likely tokens; the branches stay as they are."""

    @abstractmethod
    def grow(self, branches: Sequence[B], *, whole: bool = False, up_to: int | None = None) -> None:
        """Let branches grow, each to the end of its next step, or with `whole` to its own end.

        Args:
            branches: that have not ended.
            whole: continue beyond the ends of steps.
            up_to: stop at this many tokens.
        """

    @abstractmethod
    def rate(self, branches: Sequence[B]) -> Array:
        """Scores (n,) float32 of branches as they stand; NaN for one without."""

    @abstractmethod
    def judge(self, branches: Sequence[B]) -> Array:
        """Scores (n,) float32 of branches that have ended; each is rated once."""

    @abstractmethod
    def note(self, branch: B, score: float, round_: int, fate: str, lookahead: B | None = None) -> None:
        """Record the piece that a branch has grown since it was last judged, and its fate."""

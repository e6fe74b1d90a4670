"""The protocol that `Model` and its stand-in `FakeModel` share, to annotate with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from .generate.options import GenerateOptions, shows_options
from .generate.result import Generation
from .rank.result import Ranking
from .selection.vote import Answers
from .text.reader import Item

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ModelLike"]


class ModelLike(Protocol):
    """Anything that ranks and generates: code annotated with it takes a `Model`, and in tests a `FakeModel`."""

    @property
    def provider(self) -> str:
        """Where it runs."""
        ...

    def prepare(self, prompt: Item, *, instruction: str | None = None) -> bool:
        """See `Model.prepare`."""
        ...

    def rank(
        self,
        prompt: Item,
        candidates: Sequence[Item],
        *,
        aggregation: str | None = None,
        step_masks: Sequence[Sequence[int]] | None = None,
        partial: bool = False,
        truncate: bool = False,
        instruction: str | None = None,
        vote: str = "score",
        answers: Answers | None = None,
    ) -> Ranking:
        """See `Model.rank`."""
        ...

    @shows_options()
    def generate(
        self,
        prompt: Item,
        *,
        vote: str = "score",
        answers: Answers | None = None,
        deadline: float | None = None,
        on_progress: Callable[[Generation], object] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """See `Model.generate`.

        Args:
            prompt: text, messages or token ids.
            vote: as in `rank`.
            answers: how to find what a candidate votes for.
            deadline: in seconds.
            on_progress: called with the candidates after every token.
            **options: how to generate.
        """
        ...

    @shows_options()
    def stream(
        self, prompt: Item, *, deadline: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[Generation]:
        """See `Model.stream`.

        Args:
            prompt: text, messages or token ids.
            deadline: in seconds.
            **options: how to generate.
        """
        ...

    def close(self) -> None:
        """See `Model.close`."""
        ...

"""The base of every search method: what it does, and what it declares to the search around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from bonnx.errors import InputError, near_miss

from ..arrays import Array
from ..checks import shown
from .choice import choose
from .settings import check_values
from .tree import B, Branch, Tree

__all__ = ["Finalists", "Method", "check_settings", "method_named"]


@dataclass(frozen=True)
class Finalists:
    """The candidates to choose from.

    Attributes:
        branches: the candidates (n).
        scores: (n,) float32, NaN for one that cannot win.
        answer_ids: (n,) int64, equal for equal answers; below 0 where there is none.
        vote: how they vote.
        vote_weight: of `Scoring`: what a candidate adds to its answer in a weighted vote.
    """

    branches: Sequence[Branch]
    scores: Array
    answer_ids: Array
    vote: str
    vote_weight: str


@dataclass(frozen=True)
class Method:
    """A way to spend a budget of completions.

    A method is a frozen dataclass whose fields are its settings, each with its bounds and a description:
    `Annotated[int, Meta(ge=1, description="...")]`.

    Attributes:
        needs_certainty: whether it reads the self-certainty of every token.
        continues_probe: whether the completions by which a policy judged the prompt become its own first ones.
            Otherwise they are candidates beside its own.
        needs_artifact: why it cannot work where another program generates; empty if it can.
        needs_own_tree: whether it needs another tree than the one in which a policy judged the prompt.
        needs_scorer: whether it judges completions that are under way.
    """

    needs_certainty: ClassVar[bool] = False
    continues_probe: ClassVar[bool] = False
    needs_artifact: ClassVar[str] = ""
    needs_own_tree: ClassVar[bool] = False
    needs_scorer: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_values(self)

    def run(self, tree: Tree[B], budget: int, begun: Sequence[B] = ()) -> list[B]:
        """The candidates.

        Args:
            tree: has no branches except those in `begun`.
            budget: the maximum number of completions.
            begun: finished branches that count as its first ones; only if `continues_probe`.

        Raises:
            InputError: the budget is less than the method needs.
        """
        raise NotImplementedError

    def room(self, limit: int, prompt: int) -> int:
        """Tokens of the longest completion, in an artifact that takes `limit` after a prompt of `prompt` tokens.

        Raises:
            InputError: there is no room.
        """
        return limit - prompt

    def check_length(self, length: int, limit: int, prompt: int) -> None:
        """Refuse a `max_new_tokens` of `length` that the method has no room for.

        Raises:
            InputError: says how long a completion may be.
        """

    def choose(self, finalists: Finalists) -> tuple[int, Array]:
        """The index of the winner, -1 if nothing can win, and each candidate's group score (n,) float32."""
        return choose(finalists.scores, finalists.answer_ids, finalists.vote, finalists.vote_weight)


def method_named(name: object, methods: Mapping[str, type[Method]]) -> type[Method]:
    """The method of a name.

    Raises:
        InputError: there is none.
    """
    if not isinstance(name, str) or name not in methods:
        raise InputError(f"method: unknown {shown(name)}; {near_miss(name, methods, 'expected one of')}")
    return methods[name]


def check_settings(name: str, method: type[Method], settings: Iterable[str], others: Sequence[str] = ()) -> None:
    """Refuse settings that a method does not have; `others` are further options that the caller knows.

    Raises:
        InputError: names the first one.
    """
    known = [*(field.name for field in dataclasses.fields(method)), *others]
    for setting in settings:
        if setting not in known:
            raise InputError(f"unknown option '{setting}' of method '{name}'; {near_miss(setting, known)}")

"""The search methods by name, and what follows from a name alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Meta

from bonnx.errors import InputError

from .beam import Beam, DiverseTrees, Lookahead
from .method import Method, check_settings, method_named
from .pruning import Pruned
from .revisions import Revisions
from .sampling import Adaptive, Sampling, SelfCertainty
from .settings import definitions

__all__ = ["METHODS", "SETTINGS", "make_method", "vote_of"]

METHODS: dict[str, tuple[type[Method], str | None]] = {
    "best_of_n": (Sampling, "score"),
    "weighted": (Sampling, "weighted"),
    "majority": (Sampling, "majority"),
    "self_certainty": (SelfCertainty, "borda"),
    "adaptive": (Adaptive, "score"),
    "pruned": (Pruned, "score"),
    "beam": (Beam, None),
    "lookahead": (Lookahead, None),
    "dvts": (DiverseTrees, None),
    "revisions": (Revisions, None),
}
"""Each search method by name: its class, whose fields are its settings, and how it chooses from its candidates.

None stands for a weighted vote if there are answers, otherwise for the best score.
"""

SETTINGS: dict[str, tuple[Any, Meta, list[str]]] = {}
"""Each setting by name: its type, its bounds and description, and the methods that have it."""

for _method, (_kind, _) in METHODS.items():
    for _name, (_type, _meta) in definitions(_kind).items():
        SETTINGS.setdefault(_name, (_type, _meta, []))[2].append(_method)


def make_method(name: object, settings: Mapping[str, object], others: Sequence[str] = ()) -> Method:
    """A method with its settings; `others` are further options that the caller knows, for near misses.

    Raises:
        InputError: there is no such method, or it has no such setting, or not with this value.
    """
    kind = method_named(name, {name: kind for name, (kind, _) in METHODS.items()})
    check_settings(str(name), kind, settings, others)
    return kind(**settings)


def vote_of(method: str, vote: str | None, *, has_answers: bool) -> str:
    """How a method's winner is chosen: `score`, `weighted`, `majority` or `borda`.

    Args:
        method: its name.
        vote: as the caller says; None for the method's own.
        has_answers: whether candidates have answers.

    Raises:
        InputError: the method has a vote of its own.
    """
    default = METHODS[method][1]
    if default == "borda":
        if vote not in (None, "borda"):
            raise InputError(f"vote: self_certainty votes by its own rule, 'borda'; got {vote!r:.60}")
        return default
    if vote is not None:
        return vote
    return default or ("weighted" if has_answers else "score")

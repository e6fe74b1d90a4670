"""What generation is asked for, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from ...errors import InputError, near_miss
from ..arrays import Array
from ..checks import check_number, check_whole
from ..selection.aggregate import aggregation_code

__all__ = [
    "GREEDY_BELOW",
    "GenerateOptions",
    "Request",
    "make_request",
]

# Divided by less, the last bits of two logits decide which token is drawn: then the most likely one is taken.
GREEDY_BELOW = np.float32(1e-5)


class GenerateOptions(TypedDict, total=False):
    """How to generate. None stands for an option that is not given."""

    n: int
    """Candidates, 1 if not given. The first 8 of 16 are those of 8."""
    max_new_tokens: int
    """Longest completion; what the artifact's limit leaves if not given."""
    temperature: float
    """Divides the logits; 0, and whatever is below 1e-5, takes the most likely token; 1 if not given."""
    top_k: int
    """Draw from the k most likely tokens; 0, the default, from all."""
    top_p: float
    """Then from the smallest set of most likely ones with this probability; 1, the default, from all."""
    seed: int
    """Of every random number: the same seed gives the same tokens in every runtime; 0 if not given."""
    stop: Sequence[int | str] | None
    """Tokens that end a completion, as ids or texts of one token each; the artifact's end token if not given."""
    aggregation: str | None
    """As in `rank`; the step forms read the artifact's step token."""
    prune_every: int
    """After every so many tokens only the best candidates go on (Sun et al., 2024); 0, the default, never."""
    prune_keep: float
    """The share that goes on, rounded up; 0.5 if not given."""


def _float32(value: Any) -> np.float32:
    """A number as a graph takes it; infinite if it is too large."""
    with np.errstate(over="ignore"):
        rounded: np.float32 = np.float32(float(value))
    return rounded


@dataclass(frozen=True)
class Request:
    """Checked options of one generation.

    Raises:
        InputError: an option is invalid; it is named.
    """

    n: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop_tokens: tuple[int, ...]
    aggregation: str
    prune_every: int
    prune_keep: float

    def __post_init__(self) -> None:
        aggregation_code(self.aggregation)
        for name, least in (("n", 1), ("max_new_tokens", 1), ("top_k", 0), ("prune_every", 0), ("seed", -(2**63))):
            check_whole(name, getattr(self, name), least)
        # Finite as the float32 that the graph takes, too.
        greedy = "a number of at least 0 (0 is greedy) and at most 3.4e38"
        check_number(
            "temperature", self.temperature, greedy, lambda value: value >= 0 and math.isfinite(_float32(value))
        )
        for name in ("top_p", "prune_keep"):
            expected = "a number above 0 and at most 1"
            check_number(name, getattr(self, name), expected, lambda value: 0 < value <= 1)

    def drawing(self) -> dict[str, Array]:
        """The feeds of a draw."""
        temperature, top_p = _float32(self.temperature), _float32(self.top_p)
        return {
            "temperature": np.array(temperature if temperature >= GREEDY_BELOW else 0, np.float32),
            "top_k": np.array(self.top_k, np.int64),
            # A share that float32 rounds to 0 still holds the most likely token.
            "top_p": np.array(max(top_p, np.finfo(np.float32).tiny), np.float32),
        }


def make_request(
    options: GenerateOptions, stop_tokens: tuple[int, ...], aggregation: str, max_new_tokens: int
) -> Request:
    """Check options and fill in what was not given.

    Raises:
        InputError: an option is unknown (the near miss is named) or invalid.
    """
    known = GenerateOptions.__annotations__
    for name in options:
        if name not in known:
            raise InputError(f"unknown option '{name}' of generate; {near_miss(name, known)}")
    defaults = {"n": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "prune_every": 0, "prune_keep": 0.5}
    given = {name: value for name, value in options.items() if value is not None and name != "stop"}
    filled: dict[str, Any] = {**defaults, "aggregation": aggregation, "max_new_tokens": max_new_tokens, **given}
    return Request(stop_tokens=stop_tokens, **filled)

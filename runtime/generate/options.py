"""What generation is asked for, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, near_miss
from ..checks import check_number, shown
from ..engine.session import Array
from ..text.reader import aggregation_code

__all__ = [
    "FINISH_REASONS",
    "GREEDY_BELOW",
    "Candidate",
    "GenerateOptions",
    "Generation",
    "Request",
    "check_whole",
    "make_request",
]

# `generate.onnx` gives an index into the first three.
FINISH_REASONS = ("length", "stop", "pruned", "deadline")
# Divided by less, the last bits of two logits decide which token is drawn: then the most likely one is taken.
GREEDY_BELOW = np.float32(1e-5)


@dataclass(frozen=True)
class Candidate:
    """One completion.

    Attributes:
        text: what it adds to the prompt's text, without special tokens and without the artifact's own end or stop
            token (a stop that the caller asked for stays); None if the artifact has no tokenizer.
        tokens: (length,) int64, the stop token included.
        scores: (length,) float32, the scorer's value at each token.
        log_probs: (length,) float32, of each token under the model itself (temperature 1, unfiltered), in nats.
        score: the candidate's score; NaN for one that cannot win.
        finish_reason: `stop`, `length`, `pruned`, `deadline`, or None while it grows.
    """

    text: str | None
    tokens: NDArray[np.int64]
    scores: NDArray[np.float32]
    log_probs: NDArray[np.float32]
    score: float
    finish_reason: str | None


@dataclass(frozen=True)
class Generation:
    """N completions of one prompt.

    Attributes:
        best_index: index of the winner; ties go to the lowest; -1 while nothing can win.
        candidates: in the order of their numbers: the first 8 of 16 are those of 8.
        prompt_tokens: tokens of the prompt, computed once.
        computed_tokens: tokens that the network read for all candidates together, without the prompt.
        aggregation: how a candidate's scores became one.
    """

    best_index: int
    candidates: list[Candidate]
    prompt_tokens: int
    computed_tokens: int
    aggregation: str

    @property
    def best(self) -> Candidate:
        """The winner."""
        return self.candidates[self.best_index]


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


def check_whole(name: str, value: object, least: int, otherwise: str = "") -> None:
    """Refuse what is no whole number of at least `least` that fits into 64 bits; `otherwise` says what else would do.

    Raises:
        InputError: names it.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not least <= value < 2**63:  # type: ignore[operator]
        most = " and below 2^63" if whole and value >= 2**63 else ""  # type: ignore[operator]
        raise InputError(f"{name}: expected a whole number of at least {least}{most}{otherwise}; got {shown(value)}")


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

"""How to generate: the one definition of the options, their defaults and their bounds."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, TypeVar, get_type_hints

import numpy as np

from bonnx.errors import InputError, near_miss

from ..arrays import Array
from ..checks import check_number, check_whole
from ..selection.aggregate import aggregation_code

__all__ = [
    "DEFAULTS",
    "GREEDY_BELOW",
    "SEARCH_OPTIONS",
    "CheckedOptions",
    "GenerateOptions",
    "check_options",
    "option_help",
    "shows_options",
]

_Method = TypeVar("_Method", bound=Callable[..., Any])
# Divided by less, the last bits of two logits decide which token is drawn: then the most likely one is taken.
GREEDY_BELOW = np.float32(1e-5)


class GenerateOptions(TypedDict, total=False):
    """How to generate: the one list of options, which Python, the command line and HTTP share.

    None stands for an option that is not given; `DEFAULTS` holds what is then taken.
    """

    n: Annotated[int, "number of candidates; the first 8 of 16 are those of 8"]
    max_new_tokens: Annotated[int | None, "maximum length of a completion in tokens; by default what the limit leaves"]
    temperature: Annotated[float, "divides the logits; 0, and anything below 1e-5, takes the most likely token"]
    top_k: Annotated[int, "draw from the k most likely tokens; 0 draws from all"]
    top_p: Annotated[float, "then draw from the smallest set of most likely tokens with this probability; 1 is all"]
    seed: Annotated[int, "of every random number: the same seed gives the same tokens in every runtime"]
    stop: Annotated[
        Sequence[int | str] | None,
        "tokens that end a completion, as ids or as texts of one token each; by default the artifact's own",
    ]
    aggregation: Annotated[
        str | None, "how a candidate's scores become one, as in `rank`; by default the artifact's own rule"
    ]
    prune_every: Annotated[int, "tokens after which only the best candidates are kept (Sun et al., 2024); 0 is never"]
    prune_keep: Annotated[float, "the share of candidates that a pruning keeps, rounded up"]


DEFAULTS: Mapping[str, Any] = {
    "n": 1,
    "max_new_tokens": None,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "seed": 0,
    "stop": None,
    "aggregation": None,
    "prune_every": 0,
    "prune_keep": 0.5,
}
# What a search takes: it sets the number of candidates itself, and prunes by a method of its own.
SEARCH_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "aggregation")


def option_help(name: str) -> str:
    """What an option of `GenerateOptions` does."""
    text: str = get_type_hints(GenerateOptions, include_extras=True)[name].__metadata__[0]
    return text


def shows_options(names: Sequence[str] = tuple(DEFAULTS)) -> Callable[[_Method], _Method]:
    """For a method that takes `**options`: its signature and docstring show each of them with its default."""

    def show(method: _Method) -> _Method:
        hints = get_type_hints(GenerateOptions)
        signature = inspect.signature(method)
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS[name], annotation=hints[name])
            for name in names
        ]
        own = [*signature.parameters.values()]
        if len(names) == len(DEFAULTS):
            # There are no others.
            own = [parameter for parameter in own if parameter.kind != parameter.VAR_KEYWORD]
        rest = [parameter for parameter in own if parameter.kind == parameter.VAR_KEYWORD]
        parameters = [*own[: len(own) - len(rest)], *options, *rest]
        method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        if method.__doc__ is not None:
            before, line, after = re.split(r"(?m)^( +\*\*options: .*\n)", method.__doc__, maxsplit=1)
            indent = line[: len(line) - len(line.lstrip())]
            shown = "".join(f"{indent}{name}: {option_help(name)}. Default: {DEFAULTS[name]}.\n" for name in names)
            method.__doc__ = before + (line if rest else "") + shown + after
        return method

    return show


def _float32(value: Any) -> np.float32:
    """A number as a graph takes it; infinite if it is too large."""
    with np.errstate(over="ignore"):
        rounded: np.float32 = np.float32(float(value))
    return rounded


@dataclass(frozen=True)
class CheckedOptions:
    """The options of one generation, complete and checked.

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


def check_options(
    options: GenerateOptions, stop_tokens: tuple[int, ...], aggregation: str, max_new_tokens: int
) -> CheckedOptions:
    """Check options and fill in what was not given.

    Raises:
        InputError: an option is unknown (the near miss is named) or invalid.
    """
    known = GenerateOptions.__annotations__
    for name in options:
        if name not in known:
            raise InputError(f"unknown option '{name}' of generate; {near_miss(name, known)}")
    given = {name: value for name, value in options.items() if value is not None}
    filled: dict[str, Any] = {**DEFAULTS, "aggregation": aggregation, "max_new_tokens": max_new_tokens, **given}
    del filled["stop"]
    return CheckedOptions(stop_tokens=stop_tokens, **filled)

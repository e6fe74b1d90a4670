"""How to generate: the one definition of the options, their defaults and their bounds."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, TypeVar, get_type_hints

import numpy as np
from msgspec import Meta

from bonnx.errors import InputError, near_miss

from ..arrays import Array
from ..checks import Bounds, check_number, check_whole
from ..selection.aggregate import aggregation_code
from ..text.stops import Stops

__all__ = [
    "DEFAULTS",
    "GREEDY_BELOW",
    "SEARCH_OPTIONS",
    "CheckedOptions",
    "GenerateOptions",
    "check_options",
    "option_bounds",
    "option_definition",
    "option_help",
    "shows_options",
]

_Method = TypeVar("_Method", bound=Callable[..., object])
# At lower temperatures rounding errors of the logits would decide which token is drawn: the most likely one is taken.
GREEDY_BELOW = np.float32(1e-5)
# The graphs take float32, whose largest number is little larger.
_MAX_FLOAT32 = 3.4e38


class GenerateOptions(TypedDict, total=False):
    """How to generate: the one list of options, which Python, the command line and HTTP share.

    None means the default in `DEFAULTS`. The bounds of a number and its description come with its type: checks, help
    and the schema of the HTTP API take them from here.
    """

    n: Annotated[int, Meta(ge=1, description="number of candidates; the first 8 of 16 are those of 8")]
    max_new_tokens: Annotated[
        int | None,
        Meta(ge=1, description="maximum length of a completion in tokens; by default what the limit leaves"),
    ]
    temperature: Annotated[
        float,
        Meta(
            ge=0,
            le=_MAX_FLOAT32,
            description="divides the logits; 0, and anything below 1e-5, takes the most likely token",
        ),
    ]
    top_k: Annotated[int, Meta(ge=0, description="draw from the k most likely tokens; 0 draws from all")]
    top_p: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="of these, draw from the smallest set of most likely tokens with this probability; 1 is all",
        ),
    ]
    seed: Annotated[
        int,
        Meta(
            ge=-(2**63),
            le=2**63 - 1,
            description="seeds the random numbers: the same seed gives the same tokens in every runtime",
        ),
    ]
    stop: Annotated[
        Sequence[int | str] | None,
        Meta(
            description="what ends a completion: texts, which its text then ends before, and token ids; by default the "
            "artifact's own tokens"
        ),
    ]
    aggregation: Annotated[
        str | None,
        Meta(description="how a candidate's scores become one, as in `rank`; by default the artifact's own rule"),
    ]
    prune_every: Annotated[
        int,
        Meta(ge=0, description="tokens after which only the best candidates are kept (Sun et al., 2024); 0 is never"),
    ]
    prune_keep: Annotated[
        float, Meta(gt=0, le=1, description="the share of candidates that a pruning keeps, rounded up")
    ]
    top_log_probs: Annotated[
        int, Meta(ge=0, le=20, description="also return the log-probabilities of this many most likely tokens; slower")
    ]


_HINTS = get_type_hints(GenerateOptions, include_extras=True)
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
    "top_log_probs": 0,
}
# What a search takes: it sets the number of candidates itself, and prunes by its own method.
SEARCH_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "aggregation")


def option_help(name: str) -> str:
    """What an option of `GenerateOptions` does."""
    return option_definition(name)[1].description or ""


def option_definition(name: str) -> tuple[Any, Meta]:
    """The type of an option, and its bounds and description."""
    hint = _HINTS[name]
    meta: Meta = hint.__metadata__[0]
    return hint.__origin__, meta


def option_bounds(name: str) -> Bounds:
    """The bounds of an option that is a number."""
    meta = option_definition(name)[1]
    return {"ge": meta.ge, "gt": meta.gt, "le": meta.le, "lt": meta.lt}


def shows_options(names: Sequence[str] = tuple(DEFAULTS)) -> Callable[[_Method], _Method]:
    """For a method that takes `**options`: its signature and docstring show each of them with its default."""

    def show(method: _Method) -> _Method:
        hints = get_type_hints(GenerateOptions)
        signature = inspect.signature(method)
        options = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS[name], annotation=hints[name])
            for name in names
        ]
        declared = [*signature.parameters.values()]
        if len(names) == len(DEFAULTS):
            # The method takes no others.
            declared = [parameter for parameter in declared if parameter.kind != parameter.VAR_KEYWORD]
        rest = [parameter for parameter in declared if parameter.kind == parameter.VAR_KEYWORD]
        parameters = [*declared[: len(declared) - len(rest)], *options, *rest]
        method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        if method.__doc__ is not None:
            before, line, after = re.split(r"(?m)^( +\*\*options: .*\n)", method.__doc__, maxsplit=1)
            indent = line[: len(line) - len(line.lstrip())]
            shown = "".join(f"{indent}{name}: {option_help(name)}. Default: {DEFAULTS[name]}.\n" for name in names)
            method.__doc__ = before + (line if rest else "") + shown + after
        return method

    return show


@dataclass(frozen=True)
class CheckedOptions:
    """The options of one generation, complete and checked.

    Attributes:
        stop_tokens: end a completion.
        stop_texts: likewise; a completion's text ends before them.
        stops_in_text: whether they are looked for in the text, by the host, since they can reach over several tokens.

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
    top_log_probs: int = 0
    stop_texts: tuple[str, ...] = ()
    stops_in_text: bool = False

    def __post_init__(self) -> None:
        aggregation_code(self.aggregation)
        for name in ("n", "max_new_tokens", "top_k", "prune_every", "seed", "top_log_probs"):
            check_whole(name, getattr(self, name), int(option_bounds(name)["ge"] or 0))
        for name in ("temperature", "top_p", "prune_keep", "top_log_probs"):
            check_number(name, getattr(self, name), **option_bounds(name))

    @property
    def needs_host(self) -> bool:
        """Whether the host must steer the loop, because it looks at more than the graph `generate` gives."""
        return self.stops_in_text or self.top_log_probs > 0

    def drawing(self) -> dict[str, Array]:
        """The feeds of a draw."""
        temperature, top_p = np.float32(float(self.temperature)), np.float32(float(self.top_p))
        return {
            "temperature": np.array(temperature if temperature >= GREEDY_BELOW else 0, np.float32),
            "top_k": np.array(self.top_k, np.int64),
            # A share that float32 rounds to 0 still holds the most likely token.
            "top_p": np.array(max(top_p, np.finfo(np.float32).tiny), np.float32),
        }


def check_options(options: GenerateOptions, stops: Stops, aggregation: str, max_new_tokens: int) -> CheckedOptions:
    """Check the options and fill in the defaults.

    Raises:
        InputError: an option is unknown (the near miss is named) or invalid.
    """
    known = GenerateOptions.__annotations__
    for name in options:
        if name not in known:
            raise InputError(f"unknown option '{name}' of generate; {near_miss(name, known)}")
    chosen = {name: value for name, value in options.items() if value is not None}
    filled: dict[str, Any] = {**DEFAULTS, "aggregation": aggregation, "max_new_tokens": max_new_tokens, **chosen}
    del filled["stop"]
    return CheckedOptions(stop_tokens=stops.tokens, stop_texts=stops.texts, stops_in_text=stops.in_text, **filled)

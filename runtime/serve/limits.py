"""Requests that are too large are refused before they are read or run."""

from __future__ import annotations

from collections.abc import Sequence

from bonnx.errors import InputError

from ..batching import Shape, TooLargeError, padded_tokens
from ..checks import ARGUMENTS, ArgumentNames
from ..engine.engine import Engine
from ..text.reader import Item
from .ranking import ClientRequest
from .settings import Settings

__all__ = ["check_size", "check_texts"]

# How much text may be tokenized for one request, in multiples of the maximum body: a prompt is tokenized with each of
# its candidates.
_TEXTS = 4


def check_texts(requests: Sequence[ClientRequest], engine: Engine, settings: Settings, *, truncate: bool) -> None:
    """Refuse texts that cannot fit or are more than the server reads at once, before they are tokenized.

    Args:
        requests: what is to be ranked.
        engine: its limits count.
        settings: those of the server.
        truncate: the beginning of a prompt may be left out, so that it may be longer.

    Raises:
        InputError: too many candidates, or too long texts.
    """
    limits, max_characters = engine.manifest.limits, engine.reader.most_characters
    for request in requests:
        if len(request.candidates) > limits.max_candidates:
            raise InputError(
                f"{len(request.candidates)} {request.names.nouns[2]}: this model takes at most "
                f"{limits.max_candidates} at once; split them"
            )
        texts: list[tuple[str, Item]] = [] if truncate else [(request.names.prompt, request.prompt)]
        texts += [(request.names.candidate(i), item) for i, item in enumerate(request.candidates)]
        for name, item in texts:
            if max_characters is not None and isinstance(item, str) and len(item) > max_characters:
                raise InputError(
                    f"{name}: {len(item)} characters are more than {limits.max_tokens} tokens can hold; shorten it"
                )
    total = sum(request.characters for request in requests)
    if total > _TEXTS * settings.max_body:
        names = requests[0].names
        prompt_noun, candidate_noun, _ = names.nouns
        raise TooLargeError(
            f"{names.prompt} and {names.candidates}: {total} characters are to be read, those of a "
            f"{prompt_noun} once with each {candidate_noun}; this server reads at most "
            f"{_TEXTS * settings.max_body} at once; send fewer or shorter ones"
        )


def check_size(shape: Shape, settings: Settings, names: ArgumentNames = ARGUMENTS) -> None:
    """Refuse what would compute more tokens than the server allows.

    Raises:
        TooLargeError: says how many.
    """
    tokens = padded_tokens(1, shape)
    if tokens > settings.max_tokens:
        prompt_noun, _, candidates_noun = names.nouns
        raise TooLargeError(
            f"{shape.candidates} {candidates_noun} of {shape.length} tokens after {shape.prompt} of the {prompt_noun} "
            f"are {tokens} tokens, padding included: this server takes at most {settings.max_tokens} at once; "
            "ask for less"
        )

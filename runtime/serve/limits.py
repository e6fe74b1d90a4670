"""What is too much for one request, refused before it is read or run."""

from __future__ import annotations

from collections.abc import Sequence

from bonnx.errors import InputError

from ..batching import Shape, padded_tokens
from ..checks import ARGUMENTS, ArgumentNames
from ..engine.engine import Engine
from ..text.reader import Item
from .ranking import ClientRequest
from .settings import Settings

__all__ = ["check_size", "check_texts"]

# How much text is tokenized for one request, by the largest body: a prompt is, once with each of its candidates.
_TEXTS = 4


def check_texts(asked: Sequence[ClientRequest], engine: Engine, settings: Settings, *, truncate: bool) -> None:
    """Refuse what cannot fit or is more than is read at once, before it is tokenized.

    Args:
        asked: what is to be ranked.
        engine: its limits count.
        settings: those of the server.
        truncate: the beginning of a prompt may be left out, so that it may be longer.

    Raises:
        InputError: too many candidates, or too long texts.
    """
    limits, most = engine.manifest.limits, engine.reader.most_characters
    for one in asked:
        if len(one.candidates) > limits.max_candidates:
            raise InputError(
                f"{len(one.candidates)} {one.names.nouns[2]}: this model takes at most {limits.max_candidates} at once"
                "; split them"
            )
        texts: list[tuple[str, Item]] = [] if truncate else [(one.names.prompt, one.prompt)]
        texts += [(one.names.candidate(i), item) for i, item in enumerate(one.candidates)]
        for name, item in texts:
            if most is not None and isinstance(item, str) and len(item) > most:
                raise InputError(
                    f"{name}: {len(item)} characters are more than {limits.max_tokens} tokens can hold; shorten it"
                )
    total = sum(one.characters for one in asked)
    if total > _TEXTS * settings.max_body:
        names = asked[0].names
        prompt_noun, candidate_noun, _ = names.nouns
        raise InputError(
            f"{names.prompt} and {names.candidates}: {total} characters are to be read, those of a "
            f"{prompt_noun} once with each {candidate_noun}; this server reads at most "
            f"{_TEXTS * settings.max_body} at once; send fewer or shorter ones"
        )


def check_size(shape: Shape, settings: Settings, names: ArgumentNames = ARGUMENTS) -> None:
    """Refuse what would compute more tokens than the server allows.

    Raises:
        InputError: says how many.
    """
    tokens, most = padded_tokens(1, shape), settings.max_tokens
    if tokens > most:
        prompt_noun, _, candidates_noun = names.nouns
        raise InputError(
            f"{shape.candidates} {candidates_noun} of {shape.length} tokens after {shape.prompt} of the {prompt_noun} "
            f"are {tokens} tokens, padding included: this server takes at most {most} at once; ask for less"
        )

"""Text to token ids and back, with the artifact's own tokenizer. Imported for language models only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from .errors import ArtifactError, InputError
from .manifest import Scoring

__all__ = ["Text"]


class Text:
    """The tokenizer of an artifact. Safe to share between threads."""

    def __init__(self, path: Path, scoring: Scoring) -> None:
        self._scoring = scoring
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise ArtifactError(f"{path}: cannot be read as a tokenizer: {e}; export the model again") from e
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self._unknown = None if unknown is None else self._tokenizer.token_to_id(unknown)

    def encode(self, text: str, what: str) -> list[int]:
        """Token ids; `what` names the text in an error.

        Raises:
            InputError: a piece of the text has no token.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._unknown is not None and self._unknown in ids:
            start, end = encoding.offsets[ids.index(self._unknown)]
            raise InputError(f"{what}: the vocabulary has no token for {text[start:end]!r} (at character {start})")
        return ids

    def encode_candidate(self, text: str, what: str, *, partial: bool) -> list[int]:
        """Token ids, finished with the end token as the scoring rule says, unless the text is partial."""
        ids, end = self.encode(text, what), self._scoring.end_token
        return ids if partial or end is None or ids[-1:] == [end] else [*ids, end]

    def encode_stop(self, text: str) -> int:
        """The one token that a stop text is.

        Raises:
            InputError: it is none, or several.
        """
        ids = self.encode(text, "stop")
        if len(ids) != 1:
            raise InputError(f"stop: {text!r} is {len(ids)} tokens; expected a text of exactly one, or a token id")
        return ids[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without the end token."""
        text: str = self._tokenizer.decode([i for i in ids if i != self._scoring.end_token], skip_special_tokens=True)
        return text

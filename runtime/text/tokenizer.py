"""Text to token ids and back, with the artifact's own tokenizer. Imported for language models only.

A prompt and a candidate are tokenized as one text, as the model saw them in training: a token may begin in the prompt
and end in the candidate. The characters that a token covers tell which of the two it belongs to.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tokenizers

from bonnx.errors import ArtifactError, InputError

from ..artifact.manifest import Scoring, TextRules
from ..checks import ARGUMENTS, ArgumentNames
from .detokenizer import Detokenizer
from .stops import before_stop, held_back

__all__ = ["NO_TOKENS", "Passage", "TokenizedRow", "Tokenizer"]

NO_TOKENS = "it has no tokens; expected at least one"


@dataclass(frozen=True)
class Passage:
    """A whole text to score.

    Attributes:
        text: prompt and candidate.
        start: character at which the candidate's own part begins.
        stop: character at which it ends; a template may write something after it.
        cuts: characters at which a token begins: what is before them is tokenized by itself.
    """

    text: str
    start: int
    stop: int
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenizedRow:
    """The tokens of a passage.

    Attributes:
        ids: all of them.
        first: index of the first that reaches into the candidate's own part.
        ends: indices of those at which a step ends, if the artifact's steps end with a text; otherwise None.
    """

    ids: list[int]
    first: int
    ends: list[int] | None


class _Encoding(NamedTuple):
    """Token ids of a text, and the characters that each covers."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class _Fault(NamedTuple):
    """The characters of a text that cannot be encoded, and why."""

    start: int
    end: int
    reason: str

    def describe(self, border: int, before: str = "prompt") -> str:
        """The reason and the place, counted from `border`; `before` names the part before that."""
        if self.start < border:
            return f"{self.reason} (it begins in the {before})"
        return f"{self.reason} (at character {self.start - border})"


class Tokenizer:
    """The tokenizer of an artifact. Safe to share between threads."""

    def __init__(self, path: Path, scoring: Scoring, rules: TextRules) -> None:
        self._scoring, self._rules = scoring, rules
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise ArtifactError(f"{path}: cannot be read as a tokenizer: {e}; export the model again") from e
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        refused = unknown is not None and rules.unknown == "refuse"
        self._unknown = self._tokenizer.token_to_id(str(unknown)) if refused else None
        self.longest_token = max(map(len, self._tokenizer.get_vocab()), default=1)
        """Characters of the longest token."""
        self._special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._detokenizer = Detokenizer(self._tokenizer, self._special)

    @property
    def step_text(self) -> str | None:
        """The text at which a program that generates ends a step; None if the artifact does not say."""
        # Candidates come with what they are split at; the scorer's own ending takes its place.
        text, token = self._rules.step_split or self._rules.step_text, self._scoring.step_token
        return text if text is not None or token is None else self.pieces([token])[0]

    def encode(self, text: str, name: str, *, special: bool = False) -> list[int]:
        """Token ids, with the tokenizer's own special tokens if `special`; `name` is the text's name in errors.

        Raises:
            InputError: a piece of the text has no token.
        """
        fault = _no_unicode(text)
        if fault is None:
            encoding = self._tokenizer.encode(text, add_special_tokens=special)
            fault = self._no_token(_Encoding(encoding.ids, encoding.offsets), text)
        if fault is not None:
            raise InputError(f"{name}: {fault.describe(0)}")
        ids: list[int] = encoding.ids
        return ids

    def rows(
        self, passages: Sequence[Passage], names: ArgumentNames = ARGUMENTS, *, special: bool, partial: bool
    ) -> list[TokenizedRow | str]:
        """Token ids of whole texts, each finished with the end token as the scoring rule says, unless partial.

        Returns:
            for each text its row, or why its candidate cannot be read.

        Raises:
            InputError: a piece of the prompt has no token.
        """
        reasons: list[str | None] = [_blame(p, _no_unicode(p.text), names) for p in passages]
        encodable = [p for p, reason in zip(passages, reasons, strict=True) if reason is None]
        encodings = self._encode(encodable, special)
        rows = (self._row(p, encoding, partial, names) for p, encoding in zip(encodable, encodings, strict=True))
        return [next(rows) if reason is None else reason for reason in reasons]

    def _encode(self, passages: Sequence[Passage], special: bool) -> list[_Encoding]:
        """Tokens of whole texts, and the characters that each covers."""
        pieces = [
            (place, p.text[place:end])
            for p in passages
            for place, end in zip((0, *p.cuts), (*p.cuts, len(p.text)), strict=True)
        ]
        encoded = self._tokenizer.encode_batch([text for _, text in pieces], add_special_tokens=special)
        joined: list[_Encoding] = []
        for (place, _), piece in zip(pieces, encoded, strict=True):
            if not place:
                joined.append(_Encoding(list(piece.ids), list(piece.offsets)))
                continue
            joined[-1].ids.extend(piece.ids)
            joined[-1].offsets.extend((start + place, end + place) for start, end in piece.offsets)
        return joined

    def _row(self, passage: Passage, encoding: _Encoding, partial: bool, names: ArgumentNames) -> TokenizedRow | str:
        reason = _blame(passage, self._no_token(encoding, passage.text), names)
        if reason is not None:
            return reason
        ids, spans = list(encoding.ids), encoding.offsets
        first = next((i for i, (_, end) in enumerate(spans) if end > passage.start), None)
        if first is None or passage.stop <= passage.start:
            return NO_TOKENS
        # An independent text keeps the special tokens at its beginning.
        first = first if passage.start else 0
        end_token = self._scoring.end_token
        if not partial and end_token is not None and ids[-1:] != [end_token]:
            ids.append(end_token)
        reward_token = self._scoring.reward_token
        if reward_token is not None and ids[-1] != reward_token:
            ids.append(reward_token)
        if self._rules.step_text is None:
            return TokenizedRow(ids, first, None)
        # Tokens that a tokenizer adds cover no character; their span would be out of order.
        order = [i for i, (start, end) in enumerate(spans) if end > start]
        starts, ends = [spans[i][0] for i in order], set()
        for last in _occurrences(passage, self._rules.step_text):
            place = bisect_right(starts, last) - 1
            if place >= 0 and spans[order[place]][1] > last:
                ends.add(order[place])
        return TokenizedRow(ids, first, sorted(ends))

    def _no_token(self, encoding: _Encoding, text: str) -> _Fault | None:
        if self._unknown is None or self._unknown not in encoding.ids:
            return None
        start, end = encoding.offsets[encoding.ids.index(self._unknown)]
        return _Fault(start, end, f"the vocabulary has no token for {text[start:end]!r:.60}")

    def is_special(self, token: int) -> bool:
        """Whether a token is one of the tokenizer's special ones."""
        return token in self._special

    def stop_tokens(self, text: str) -> list[int]:
        """The token that a stop text is, and all longer tokens that hold it; none if it is several tokens.

        Raises:
            InputError: it is empty, or the vocabulary has no token for a piece of it.
        """
        ids = self.encode(text, "stop")
        if not ids:
            raise InputError("stop: expected texts of at least one character; got an empty one")
        # Some tokenizers write a space before a text that stands alone.
        if len(ids) != 1 or self.pieces(ids) != [text]:
            return []
        return [*ids, *self._detokenizer.tokens_with(ids[0], text)]

    def decode(
        self, ids: Sequence[int], before: Sequence[int], finish_reason: str | None, stop_texts: Sequence[str] = ()
    ) -> str:
        """The text that a completion adds to its prompt: prompt plus text is what the model wrote.

        Special tokens are left out, as are the artifact's end or stop token that ended it, a stop text that did, and,
        while it grows (`finish_reason` is None), the bytes of an incomplete character and what may be the beginning of
        a stop text.
        """
        growing = finish_reason is None
        ends = {self._scoring.end_token, *self._scoring.stop_tokens}
        if finish_reason == "stop" and ids[-1] in ends:
            return self._detokenizer.text(ids[:-1], before)
        text = self._detokenizer.text(ids, before, growing=growing)
        if growing:
            return text[: len(text) - held_back(text, stop_texts)]
        if finish_reason == "stop" and stop_texts:
            shorter = before_stop(text, stop_texts, len(self._detokenizer.text(ids[:-1], before, growing=True)))
            return text if shorter is None else shorter
        return text

    def ends_in_stop(self, ids: Sequence[int], before: Sequence[int], stop_texts: Sequence[str]) -> bool:
        """Whether the last token of a completion completes a stop text."""
        # A token that is not special writes a byte at least.
        longest = max(len(stop.encode()) for stop in stop_texts)
        tail, place = list[int](), len(ids)
        while place and len(tail) <= longest:
            place -= 1
            if not self.is_special(ids[place]):
                tail.append(ids[place])
        if not tail or self.is_special(ids[-1]):
            return False
        tail.reverse()
        context = [*before, *ids[:place]]
        whole = self._detokenizer.text(tail, context, growing=True)
        border = len(self._detokenizer.text(tail[:-1], context, growing=True))
        return before_stop(whole, stop_texts, border) is not None

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; the bytes of a character come with its last token."""
        return self._detokenizer.pieces(ids)


def _no_unicode(text: str) -> _Fault | None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return _Fault(e.start, e.end, f"expected Unicode text; {text[e.start]!r} is half of a surrogate pair")
    return None


def _blame(passage: Passage, fault: _Fault | None, names: ArgumentNames) -> str | None:
    """Why a candidate cannot be read.

    Raises:
        InputError: the fault is in the prompt.
    """
    if fault is None:
        return None
    if fault.end <= passage.start:
        raise InputError(f"{names.prompt}: {fault.describe(0)}")
    return fault.describe(passage.start, names.nouns[0])


def _occurrences(passage: Passage, step_text: str) -> list[int]:
    """The last character of each step's end within the candidate's own part."""
    last_characters, place = [], passage.text.find(step_text, passage.start, passage.stop)
    while place >= 0:
        last_characters.append(place + len(step_text) - 1)
        place = passage.text.find(step_text, place + len(step_text), passage.stop)
    return last_characters

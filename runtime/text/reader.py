"""Prompts and candidates of every kind become the arrays that a graph takes; invalid ones are refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from bonnx.errors import InputError

from ..arrays import Array
from ..artifact.limits import TooLargeError
from ..artifact.manifest import Manifest, Scoring
from ..checks import ARGUMENTS, ArgumentNames, is_list, shown
from .compose import Composer, Item, is_text
from .rows import EncodedRows, NoneReadableError, UnreadItems, none_readable
from .stops import Stops
from .tokenizer import NO_TOKENS, Tokenizer

__all__ = [
    "EncodedRows",
    "Item",
    "NoneReadableError",
    "Reader",
    "check_stop",
    "none_readable",
]

# What they have in common with each other, a query has in common with all documents.
_DOCUMENTS = ("a", "1")
# A growing text is compared with each of them after every token.
_LONGEST_STOP = 1000


def check_stop(stop: object) -> None:
    """Refuse anything but a list of token ids and texts.

    Raises:
        InputError: it is something else.
    """
    entries = stop if is_list(stop) else [None]
    if any(isinstance(entry, bool) or not isinstance(entry, int | np.integer | str) for entry in entries):  # type: ignore[attr-defined]
        raise InputError(f"stop: expected a list of token ids or of texts; got {shown(stop)}")


class Reader:
    """Checks items against the manifest and turns them into arrays (length,) int64 or (length, embed_dim) float32."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer | None, composer: Composer) -> None:
        self.tokenizer, self._composer = tokenizer, composer
        self._limit = manifest.limits.max_tokens
        self.vocabulary = manifest.size("vocab_size") if manifest.kind == "language_model" else None
        self.width = None if manifest.kind == "language_model" else manifest.size("embed_dim")
        self._blank: Array = np.zeros(0, np.int64) if self.width is None else np.zeros((0, self.width), np.float32)

    def prompt(self, item: Item, name: str = "prompt", *, instruction: str | None = None) -> Array:
        """The prompt that the model continues, or what all documents of a query share; `name` is its name in errors.

        Raises:
            InputError: it cannot be read; the message says why.
        """
        self._check_instruction(instruction, item)
        if is_text(item) and self._composer.ranks_pairs:
            rows = self.pairs(
                item, _DOCUMENTS, ArgumentNames(name), partial=False, truncate=False, instruction=instruction
            )
            assert rows.prompt is not None
            return rows.prompt
        if not is_text(item):
            array = self._array(item, name)
            if not len(array):
                raise InputError(f"{name}: {NO_TOKENS}")
            return array
        tokenizer = self._require_tokenizer(name)
        text, special = self._composer.prompt(item, name)
        return np.array(tokenizer.encode(text, name, special=special), np.int64)

    @property
    def most_characters(self) -> int | None:
        """The maximum length of a text that can fit into the limit of tokens; None without a tokenizer."""
        return None if self.tokenizer is None else self._limit * self.tokenizer.longest_token

    def rows(self, items: Sequence[Item], names: ArgumentNames, *, partial: bool) -> EncodedRows:
        """Independent rows; `names` are their names in errors.

        Raises:
            InputError: an item is not of a kind that this artifact takes (it is named), or none can be read.
        """
        unread = self._sorted(items, names)
        if unread.texts:
            passages, special = self._composer.rows([*unread.texts.values()], unread.names(), names.candidates)
            unread.take(
                self._require_tokenizer(names.candidates).rows(passages, names, special=special, partial=partial)
            )
        return unread.rows(None)

    def pairs(
        self,
        prompt: Item,
        candidates: Sequence[Item],
        names: ArgumentNames = ARGUMENTS,
        *,
        partial: bool,
        truncate: bool,
        instruction: str | None = None,
    ) -> EncodedRows:
        """A prompt and its candidates.

        Args:
            prompt: text, messages, token ids or embeddings.
            candidates: at least one.
            names: their names in errors.
            partial: text candidates are not finished.
            truncate: drop the beginning of a prompt that is too long.
            instruction: of a reranker, for this query.

        Raises:
            InputError: the prompt cannot be read, a candidate is not of a kind that this artifact takes (it is named),
                or none can be read.
        """
        self._check_instruction(instruction, prompt)
        unread = self._sorted(candidates, names)
        texts, text_names = [*unread.texts.values()], unread.names()
        if is_text(prompt) and not unread.arrays:
            passages, special = self._composer.pairs(
                prompt, texts, names.prompt, text_names, partial=partial, instruction=instruction
            )
            tokenizer = self._require_tokenizer(names.prompt)
            unread.take(tokenizer.rows(passages, names, special=special, partial=partial))
            encoded = unread.rows_behind_prompt()
        else:
            prompt_row = self.prompt(prompt, names.prompt)
            if texts:
                # After a prompt that is not text, or beside candidates that are not.
                passages = [self._composer.alone(text, name) for text, name in zip(texts, text_names, strict=True)]
                tokenizer = self._require_tokenizer(text_names[0])
                unread.take(tokenizer.rows(passages, names, special=False, partial=partial))
            encoded = unread.rows(prompt_row)
        # The beginning of a query's text is the template's own.
        return self._truncated(encoded, names) if truncate and not self._composer.ranks_pairs else encoded

    def _check_instruction(self, instruction: str | None, prompt: Item) -> None:
        if instruction is None:
            return
        if not isinstance(instruction, str):
            raise InputError(f"instruction: expected a text; got {shown(instruction)}")
        if not self._composer.ranks_pairs or not is_text(prompt):
            raise InputError(
                "instruction: it goes into the template of a reranker, with a query that is text; leave it out"
            )

    def _sorted(self, items: Sequence[Item], names: ArgumentNames) -> UnreadItems:
        unread = UnreadItems(names, len(items), self._blank)
        for i, item in enumerate(items):
            name = names.candidate(i)
            if is_text(item):
                self._require_tokenizer(name)
                reason = self._composer.blank(item)
                unread.texts[i] = item
            else:
                unread.arrays[i] = self._array(item, name)
                reason = None if len(unread.arrays[i]) else NO_TOKENS
            if reason is not None:
                unread.refuse(i, reason)
        unread.check()
        return unread

    def _truncated(self, rows: EncodedRows, names: ArgumentNames) -> EncodedRows:
        """Drop the oldest tokens of a prompt that is too long; a special token at its beginning stays."""
        prompt, longest = rows.prompt, max(map(len, rows.items))
        assert prompt is not None
        excess = len(prompt) + longest - self._limit
        if excess <= 0:
            return rows
        begins = (
            prompt.ndim == 1
            and len(prompt)
            and self.tokenizer is not None
            and self.tokenizer.is_special(int(prompt[0]))
        )
        keep = 1 if begins else 0
        if excess > len(prompt) - keep - 1:
            prompt_noun, candidate_noun, _ = names.nouns
            raise TooLargeError(
                f"a {candidate_noun} of {longest} tokens: this artifact takes at most {self._limit} together with the "
                f"{prompt_noun}, and a {candidate_noun} is never cut; shorten it, or export again with --max-tokens"
            )
        kept = np.concatenate([prompt[:keep], prompt[keep + excess :]])
        return dataclasses.replace(rows, prompt=kept, cut=excess)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token of a completion adds to its text; its number where the artifact has no tokenizer.

        Raises:
            InputError: they are no token ids.
        """
        if self.width is not None:
            raise InputError("tokens: this artifact takes embeddings; it has no vocabulary")
        ids: list[int] = self._array(tokens, "tokens").tolist()
        return [f"{token} " for token in ids] if self.tokenizer is None else self.tokenizer.pieces(ids)

    def stops(self, stop: Sequence[int | str] | None, scoring: Scoring) -> Stops:
        """What ends a completion: the tokens and texts in `stop`, or by default the artifact's own tokens.

        Raises:
            InputError: a text that no completion can contain, or an id outside the vocabulary.
        """
        if stop is None:
            end = [] if scoring.end_token is None else [scoring.end_token]
            return Stops(tuple(dict.fromkeys([*end, *scoring.stop_tokens])))
        check_stop(stop)
        tokens, texts, in_text = list[int](), list[str](), False
        for entry in stop:
            if isinstance(entry, str):
                if self.tokenizer is None:
                    raise InputError(f"stop: this artifact has no tokenizer; pass token ids instead of {entry!r}")
                if len(entry) > _LONGEST_STOP:
                    raise InputError(f"stop: a text of {len(entry)} characters; expected at most {_LONGEST_STOP}")
                ids = self.tokenizer.stop_tokens(entry)
                in_text = in_text or not ids
                tokens += ids
                texts.append(entry)
            else:
                tokens.append(int(self._ids(np.array([entry]), "stop")[0]))
        return Stops(tuple(dict.fromkeys(tokens)), tuple(texts), in_text)

    def _require_tokenizer(self, name: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"{name}: this artifact has no tokenizer; pass {self._takes} instead of text")
        return self.tokenizer

    @property
    def _takes(self) -> str:
        if self.width is not None:
            return f"embeddings (length, {self.width}) float32"
        return "token ids" if self.tokenizer is None else "text or a 1-D list of token ids"

    def _array(self, item: Item, name: str) -> Array:
        if isinstance(item, bytes | bytearray | memoryview):
            # numpy would read them as token ids.
            raise InputError(f"{name}: expected {self._takes}; got {shown(item)}")
        try:
            array = np.asarray(item)
        except (TypeError, ValueError, OverflowError, RuntimeError) as e:
            raise InputError(f"{name}: expected {self._takes}; got {shown(item)}: {e}") from e
        if array.shape == (0,):
            # An empty list has no type of its own.
            return self._blank
        if array.dtype == object or not array.ndim:
            raise InputError(f"{name}: expected {self._takes}; got {shown(item)}")
        return self._ids(array, name) if self.width is None else self._embeddings(array, name)

    def _embeddings(self, array: Array, name: str) -> Array:
        if array.ndim != 2 or array.shape[1] != self.width:
            raise InputError(
                f"{name}: expected embeddings of shape (length, {self.width}); got {array.shape}, {array.dtype}"
            )
        if array.dtype != np.float32:
            raise InputError(f"{name}: expected float32 embeddings; got {array.dtype}; convert with .astype('float32')")
        return array

    def _ids(self, array: Array, name: str) -> Array:
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"{name}: expected {self._takes}; got {array.dtype} {array.shape}")
        assert self.vocabulary is not None
        outside = array[(array < 0) | (array >= self.vocabulary)]
        if outside.size:
            raise InputError(f"{name}: token id {outside[0]} is outside the vocabulary (0 to {self.vocabulary - 1})")
        return array.astype(np.int64)

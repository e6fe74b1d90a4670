"""Token ids to the text that they add after a prompt: prompt plus text is what the model wrote.

Decoders treat the beginning of a text specially: Llama's and Mistral's remove the space that their encoders add there.
So ids are decoded after the last tokens of their context, and the text of the context is removed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Detokenizer"]

# Replaces bytes that are not a character.
_BROKEN = "\ufffd"
# Tokens before a completion that decide how it is decoded: a character has at most 4 bytes, a token at least one.
_CONTEXT = 8


class Detokenizer:
    """Decodes for one tokenizer. Safe to share between threads.

    Args:
        tokenizer: of the `tokenizers` library.
        special: ids of its special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, special: Collection[int]) -> None:
        self._tokenizer, self._special = tokenizer, set(special)
        self._opening: list[int] = tokenizer.encode("", add_special_tokens=True).ids
        self._bytes = self._byte_tokens()

    def text(self, ids: Sequence[int], before: Sequence[int], *, growing: bool = False) -> str:
        """The text that `ids` add after `before`, without special tokens.

        Args:
            ids: a completion.
            before: its prompt, which decides whether the text begins with a space.
            growing: more tokens will come, so bytes of an incomplete character are left out.
        """
        text = self._behind(self._context(before), [i for i in ids if i not in self._special])
        return text.rstrip(_BROKEN) if growing else text

    def pieces(self, ids: Sequence[int], before: Sequence[int] | None = None) -> list[str]:
        """The text that each token adds, special tokens included; the bytes of a character come with its last token.

        Args:
            ids: a completion, or a part of one.
            before: the tokens before it; by default any text.
        """
        context = self._some_text() if before is None else self._context(before)
        result: list[str] = []
        start = written = 0
        for end in range(1, len(ids) + 1):
            whole = self._behind(context, ids[start:end])
            stable = whole if end == len(ids) else whole.rstrip(_BROKEN)
            result.append(stable[written:])
            written = max(written, len(stable))
            if whole == stable:  # all characters are complete: what follows needs only the last tokens as context
                context, start, written = [*context, *ids[start:end]][-_CONTEXT:], end, 0
        return result

    def tokens_with(self, token: int, text: str) -> list[int]:
        """The other tokens whose text holds the text of a token; none for a special token."""
        if token in self._special:
            return []
        own = text if token in self._bytes else self._tokenizer.id_to_token(token) or text
        apart = self._special | self._bytes.keys() | {token}
        holding = [i for name, i in self._tokenizer.get_vocab().items() if own in name and i not in apart]
        as_bytes = [i for i, byte in self._bytes.items() if text.encode() == bytes([byte]) and i != token]
        return sorted([*holding, *as_bytes])

    def _context(self, before: Sequence[int]) -> list[int]:
        """The tokens before a completion that decide how it is decoded; none where it begins a text."""
        words: list[int] = []
        for i in reversed(before):
            if i not in self._special:
                words.append(int(i))
                if len(words) == _CONTEXT:
                    break
        if words:
            return words[::-1]
        begins_text = list(before) in ([], self._opening)
        return [] if begins_text else [int(before[-1])]

    def _some_text(self) -> list[int]:
        """Any token that is text."""
        for i in range(self._tokenizer.get_vocab_size()):
            if i not in self._special and i not in self._bytes and self._decode([i]).strip(_BROKEN + " "):
                return [i]
        return []

    def _behind(self, context: list[int], ids: Sequence[int]) -> str:
        before, whole = self._decode(context), self._decode([*context, *ids])
        if whole.startswith(before):
            return whole[len(before) :]
        # The context ends within a character that the ids complete.
        same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
        return whole[same:]

    def _decode(self, ids: list[int]) -> str:
        """The tokenizer's text, except that invalid bytes never spoil the characters beside them."""
        broken = self._broken(ids)
        if not broken:
            return self._plain(ids)
        parts, start = [], 0
        for end in [*broken, len(ids)]:
            part = ids[start:end]
            # After a letter, so that the decoder does not treat it as the beginning of a text.
            parts.append(self._plain([self._letter, *part])[1:] if start else self._plain(part))
            start = end + 1
        return _BROKEN.join(parts)

    def _plain(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _byte_tokens(self) -> dict[int, int]:
        """The byte of each token that stands for one, where the decoder puts these together; else empty."""
        tokens = [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        ids = [i for i in tokens if i is not None]
        if len(ids) < len(tokens) or self._plain([ids[ord("a")], ids[0xC3], ids[0xA9]])[-2:] != "aé":
            return {}
        self._letter = ids[ord("a")]
        return {i: byte for byte, i in enumerate(ids)}

    def _broken(self, ids: list[int]) -> list[int]:
        """Indices of byte tokens that are not part of a character."""
        result, run = [], bytearray()
        for place, i in enumerate([*ids, None] if self._bytes else []):
            byte = None if i is None else self._bytes.get(i)
            if byte is not None:
                run.append(byte)
            elif run:
                here = place - len(run)
                for character in run.decode(errors="surrogateescape"):
                    if "\udc80" <= character <= "\udcff":
                        result.append(here)
                    here += len(character.encode(errors="surrogateescape"))
                run.clear()
        return result

"""Prompts and candidates as whole texts, from strings, messages (by a chat template) and candidates in steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from bonnx.errors import InputError

from ..artifact.manifest import TextRules
from .chat import ChatTemplate, Messages, is_messages
from .pair import PairTemplate
from .tokenizer import NO_TOKENS, Passage

__all__ = ["Composer", "Item", "TextItem", "is_text"]

# A text, messages, or a candidate's steps as texts: what is to be tokenized.
TextItem: TypeAlias = str | Messages | Sequence[str]
# A text, token ids, or embeddings (length, embed_dim) float32.
Item: TypeAlias = TextItem | Sequence[int] | NDArray[np.integer] | NDArray[np.float32]


def is_text(item: object) -> TypeGuard[TextItem]:
    """Whether an item is to be tokenized: text, messages, or a candidate as a list of steps."""
    if isinstance(item, str):
        return True
    return isinstance(item, Sequence) and len(item) > 0 and isinstance(item[0], str | Mapping)


class Composer:
    """Composes texts by the rules of one artifact; a reranker's have a template of a query and a document, `pair`."""

    def __init__(self, rules: TextRules, chat: ChatTemplate | None, pair: PairTemplate | None = None) -> None:
        self._rules, self._chat, self._pair = rules, chat, pair

    @property
    def ranks_pairs(self) -> bool:
        """Whether texts are a query and documents."""
        return self._pair is not None

    def prompt(self, item: object, name: str) -> tuple[str, bool]:
        """A prompt that the model is to continue, and whether the tokenizer puts its special tokens around it.

        Raises:
            InputError: messages without a chat template, or something that is not text.
        """
        if is_messages(item):
            return self._template(name).render(item, name, add_generation_prompt=True), False
        return self._plain(item, name), self._rules.special_tokens

    def blank(self, item: TextItem) -> str | None:
        """Why a text, messages, or steps (or one of the steps) are empty; None if they are not."""
        if isinstance(item, str):
            split = self._rules.step_split
            if self._divides(item) and not any(step.strip() for step in item.split(split)):
                return f"it has no steps; expected at least one, divided by {split!r}"
            return None if item else NO_TOKENS
        if is_messages(item):
            return NO_TOKENS if all(map(_says_nothing, item)) else None
        return next(
            (f"its step {i} is empty" for i, step in enumerate(item) if isinstance(step, str) and not step), None
        )

    def rows(self, items: Sequence[TextItem], names: Sequence[str], kind: str) -> tuple[list[Passage], bool]:
        """Independent texts or conversations, and whether the tokenizer puts its special tokens around them.

        Raises:
            InputError: an item is not text, or only some are conversations.
        """
        chats = _all_alike(items, names, kind)
        texts = [
            self._template(name).render(item, name) if is_messages(item) else self._steps(item, name)
            for item, name in zip(items, names, strict=True)
        ]
        return [Passage(text, 0, len(text)) for text in texts], self._rules.special_tokens and not chats

    def alone(self, candidate: object, name: str) -> Passage:
        """A candidate whose prompt is not text.

        Raises:
            InputError: it is not text, or a document without a query.
        """
        if self._pair is not None:
            raise InputError(f"{name}: expected token ids, as its prompt; text is a document of a query that is text")
        text = self._steps(candidate, name)
        return Passage(text, 0, len(text))

    def pairs(
        self,
        prompt: object,
        candidates: Sequence[TextItem],
        prompt_name: str,
        names: Sequence[str],
        *,
        partial: bool,
        instruction: str | None = None,
    ) -> tuple[list[Passage], bool]:
        """Each candidate after the prompt, and whether the tokenizer puts its special tokens around them.

        Args:
            prompt: text or messages.
            candidates: text, messages or steps.
            prompt_name: what errors call the prompt.
            names: what errors call each candidate.
            partial: the candidates are not finished.
            instruction: what a reranker's template gets instead of its own.

        Raises:
            InputError: something is not text, or there is no chat template for messages.
        """
        if self._pair is not None:
            if partial:
                raise InputError("partial: this model's template ends every document; leave it out")
            query = self._part(prompt, prompt_name)
            documents = [self._part(item, name) for item, name in zip(candidates, names, strict=True)]
            return self._pair.passages(query, documents, instruction), False
        if is_messages(prompt):
            return self._chats(prompt, candidates, prompt_name, names, partial), False
        before = self._plain(prompt, prompt_name)
        texts = [self._steps(c, name) for c, name in zip(candidates, names, strict=True)]
        passages = [Passage(before + text, len(before), len(before) + len(text)) for text in texts]
        return passages, self._rules.special_tokens

    def _part(self, item: object, name: str) -> str:
        """A query or a document.

        Raises:
            InputError: it is not text.
        """
        if not isinstance(item, str):
            raise InputError(
                f"{name}: this model's template makes one text of a query and a document; expected each as text; "
                f"got {item!r:.60}"
            )
        return self._plain(item, name)

    def _chats(
        self, prompt: Messages, candidates: Sequence[TextItem], prompt_name: str, names: Sequence[str], partial: bool
    ) -> list[Passage]:
        template = self._template(prompt_name)
        answers = [c if is_messages(c) else self._steps(c, name) for c, name in zip(candidates, names, strict=True)]
        if partial:
            opening = template.render(prompt, prompt_name, add_generation_prompt=True)
            texts = [opening + self._plain(answer, name) for answer, name in zip(answers, names, strict=True)]
            return [Passage(text, len(opening), len(text)) for text in texts]
        return [Passage(*whole) for whole in template.split(prompt, answers, names, prompt_name)]

    def _template(self, name: str) -> ChatTemplate:
        if self._chat is None:
            raise InputError(f"{name}: messages need a chat template, and this artifact has none; pass text")
        return self._chat

    def _plain(self, item: object, name: str) -> str:
        if not isinstance(item, str):
            raise InputError(f"{name}: expected text; got {item!r:.60}")
        if not item:
            raise InputError(f"{name}: {NO_TOKENS}")
        return item

    def _steps(self, item: object, name: str) -> str:
        """A candidate's text, with each step ended as the model expects."""
        ending, split = self._rules.step_text, self._rules.step_split
        if isinstance(item, str):
            text = self._plain(item, name)
            return (
                "".join(f"{step}{ending}" for step in text.split(split) if step.strip())
                if self._divides(text)
                else text
            )
        if not isinstance(item, Sequence) or not item or not all(isinstance(step, str) and step for step in item):
            raise InputError(f"{name}: expected text, or a list of steps that are texts; got {item!r:.60}")
        if ending is None:
            raise InputError(f"{name}: this artifact's rule does not say how a step ends; pass one text")
        return "".join(step if step.endswith(ending) else step + ending for step in item)

    def _divides(self, text: str) -> bool:
        """Whether a candidate's text has to be split into steps."""
        ending = self._rules.step_text
        return ending is not None and self._rules.step_split is not None and ending not in text


def _says_nothing(message: object) -> bool:
    """Whether a message has a role, empty content and nothing else."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or message.get("content") is None:
        return False
    return not any(value for key, value in message.items() if key != "role")


def _all_alike(items: Sequence[TextItem], names: Sequence[str], kind: str) -> bool:
    chats = [is_messages(item) for item in items]
    if any(chats) and not all(chats):
        raise InputError(
            f"{kind}: expected conversations or texts, not both: {names[chats.index(not chats[0])]} differs"
        )
    return all(chats)

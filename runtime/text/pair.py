"""A query and a document to one text, by a reranker's template. What precedes the document is the shared prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property

from bonnx.errors import ArtifactError, InputError

from ..artifact.manifest import PairRules
from .chat import common_length
from .tokenizer import Passage

__all__ = ["PairTemplate"]

# Characters that no text of people has: one of them marks a border, another stands for any document.
_PRIVATE = tuple(map(chr, range(0xE000, 0xE100)))


class PairTemplate:
    """A compiled template. Safe to share between threads; it runs in the sandbox of chat templates.

    Args:
        source: the template.
        tokens: the special tokens' texts by the names that templates use: `bos_token` and so on.
        rules: what it gets.

    Raises:
        ArtifactError: jinja2 is missing, or `source` is not a template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], rules: PairRules) -> None:
        try:
            from .sandbox import compile_template  # needs jinja2, which only templates use
        except ImportError as e:
            raise ArtifactError("templates need jinja2, which is not installed; run `pip install jinja2`") from e

        self._source, self._tokens, self._rules = source, dict(tokens), rules
        self._template = compile_template(source)

    def render(self, query: str, document: str, instruction: str | None = None, *, border: str = "") -> str:
        """The text of a query and a document.

        Args:
            query: as the caller gave it.
            document: as the caller gave it.
            instruction: None for the artifact's own.
            border: what the template writes where no token may reach across.

        Raises:
            InputError: the template refuses these texts; its own message is quoted.
            ArtifactError: the template accessed something forbidden, or exceeded its budget.
        """
        return self._render(query, document, instruction, border, datetime.now())

    def passages(self, query: str, documents: Sequence[str], instruction: str | None = None) -> list[Passage]:
        """The whole text of each document, in which the document's part begins where the text depends on it.

        Raises:
            InputError: the template refuses these texts, or takes no instruction.
            ArtifactError: as `render`.
        """
        if instruction is not None and not self.takes_instruction:
            raise InputError("instruction: this model's template takes none; leave it out")
        # The same time of day in all renderings.
        now, (border, mark) = datetime.now(), self._unused([query, instruction or "", *documents])
        before, _, behind = self._render(query, mark, instruction, border, now).partition(mark)
        after = behind.rpartition(mark)[2]
        passages = []
        for document in documents:
            text = self._render(query, document, instruction, border, now)
            start, stop = common_length(before, text), len(text) - len(after) if text.endswith(after) else len(text)
            passages.append(_without(border, Passage(text, start, max(start, stop))))
        return passages

    def messages(self, query: str, document: str, instruction: str | None = None) -> list[dict[str, object]]:
        """What the template gets: a message for the instruction, if there is one, the query and the document."""
        instruction = self._rules.instruction if instruction is None else instruction
        messages = [self._message("system", instruction)] if instruction else []
        return [*messages, self._message("query", query), self._message("document", document)]

    def ignored(self) -> list[str]:
        """Which of `query` and `document` do not reach the text.

        Raises:
            InputError: the template refuses a query and a document.
            ArtifactError: as `render`.
        """
        now = datetime.now()
        base = self._render("alpha", "bravo", None, "", now)
        changed = {"query": ("charlie", "bravo"), "document": ("alpha", "foxtrot")}
        return [name for name, pair in changed.items() if self._render(*pair, None, "", now) == base]

    @cached_property
    def takes_instruction(self) -> bool:
        """Whether an instruction reaches the text."""
        now = datetime.now()
        first, second = (self._render("alpha", "bravo", text, "", now) for text in ("charlie", "foxtrot"))
        return first != second

    def _unused(self, texts: Sequence[str]) -> list[str]:
        """Two characters that occur neither in the texts nor in the template."""
        used = set(self._source).union(*texts)
        unused = [character for character in _PRIVATE if character not in used]
        if len(unused) < 2:
            raise InputError("the texts use all of the private characters U+E000 to U+E0FF; leave some of them out")
        return unused[:2]

    def _render(self, query: str, document: str, instruction: str | None, border: str, now: datetime) -> str:
        from .sandbox import render

        messages = self.messages(query, document, instruction)
        variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": False}
        return render(self._template, {**self._tokens, **variables, **self._rules.options, "border": border}, now)

    def _message(self, role: str, text: str) -> dict[str, object]:
        flat = self._rules.content == "flat"
        return {"role": role, "content": text if flat else [{"type": "text", "text": text}]}


def _without(border: str, passage: Passage) -> Passage:
    """A passage whose text has no borders; where they were, its tokens are cut."""
    pieces = passage.text.split(border)
    if len(pieces) == 1:
        return passage
    cuts, place = [], 0
    for piece in pieces[:-1]:
        place += len(piece)
        cuts += [place] if place else []
    start = passage.start - passage.text.count(border, 0, passage.start)
    stop = passage.stop - passage.text.count(border, 0, passage.stop)
    return Passage("".join(pieces), start, stop, tuple(cuts))

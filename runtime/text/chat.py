"""Messages to text: a model's chat template, rendered in a sandbox, exactly as transformers renders it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TypeAlias, TypeGuard

from bonnx.errors import ArtifactError, BonnxError, InputError

from ..checks import shown
from .parts import ContentParts, TakesTextError, joined, lost_words, was_read

__all__ = ["ChatTemplate", "Messages", "common_length", "is_messages"]

# A role and content each, as text or in parts.
Messages: TypeAlias = Sequence[Mapping[str, object]]
# Stands for any words: a character that no template uses.
_MARK = "\ue000"
_PROBE: dict[str, object] = {"role": "user", "content": _MARK}


class ChatTemplate:
    """A compiled chat template. Safe to share between threads.

    Templates come with checkpoints and are untrusted code: they run in Jinja2's immutable sandbox, which withholds
    Python's internals, the file system and the messages' own objects; loops and output are bounded.

    Args:
        source: the template.
        tokens: the special tokens' texts by the names that templates use: `bos_token`, `eos_token` and so on.

    Raises:
        ArtifactError: jinja2 is missing, or `source` is not a template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        try:
            from .sandbox import compile_template  # needs jinja2, which only chat templates use
        except ImportError as e:
            raise ArtifactError("chat templates need jinja2, which is not installed; run `pip install jinja2`") from e

        self._tokens = dict(tokens)
        self._template = compile_template(source)

    def render(self, messages: Messages, name: str = "messages", *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, special tokens of the template included; encode it without adding others.

        Args:
            messages: `{"role": ..., "content": ...}` in order; `content` is text or a list of parts
                `{"type": "text", "text": ...}`, joined where the template expects a text. Other keys are passed to the
                template unchanged.
            name: what an error calls them.
            add_generation_prompt: end with the text that precedes the assistant's next words.

        Raises:
            InputError: the messages are malformed, or the template refuses them; its own message is quoted.
            ArtifactError: the template accessed something forbidden, or exceeded its budget.
        """
        return self._render(_plain_messages(messages, name), add_generation_prompt, datetime.now())

    def split(
        self,
        prompt: Messages,
        candidates: Sequence[str | Messages],
        names: Sequence[str],
        prompt_name: str = "messages",
    ) -> list[tuple[str, int, int]]:
        """Whole conversations, and where in each text the candidate begins and its last words end.

        Args:
            prompt: the messages that all candidates follow.
            candidates: the assistant's words, or the messages that follow the prompt's.
            names: what an error calls each of them.
            prompt_name: what an error calls the prompt.

        Returns:
            For each candidate the text of prompt and candidate together, and the character where the prompt's rendering
            with its generation prompt ends. Some templates write earlier messages differently once later ones follow;
            then it is the character where the two texts part. Last the character behind which the template closes the
            turn: what it writes there does not depend on the words.

        Raises:
            InputError: as `render`.
            ArtifactError: as `render`.
        """
        now, first = datetime.now(), _plain_messages(prompt, prompt_name)  # the same time of day in all renderings
        head = self._render(first, True, now)
        result, closing = [], None
        for candidate, name in zip(candidates, names, strict=True):
            answer = [{"role": "assistant", "content": candidate}] if isinstance(candidate, str) else candidate
            conversation = [*first, *_plain_messages(answer, name)]
            whole = self._render(conversation, False, now)
            start = common_length(head, whole)
            if closing is None or not isinstance(candidate, str):
                closing = self._closing(conversation, now)
            stop = len(whole) - len(closing) if whole.endswith(closing) else len(whole)
            result.append((whole, start, max(start, stop)))
        return result

    def _closing(self, messages: list[dict[str, object]], now: datetime) -> str:
        """What the template writes behind the last message's words."""
        if messages[-1].get("content") is None:
            return ""
        text = self._render([*messages[:-1], {**messages[-1], "content": _MARK}], False, now)
        return text.rpartition(_MARK)[2] if _MARK in text else ""

    def _render(self, messages: list[dict[str, object]], add_generation_prompt: bool, now: datetime) -> str:
        """The text. Parts are joined where the template expects a text; a text becomes one part where it expects parts.

        Where the template reads only some of the parts, such as the first, it gets all words in one part.
        """
        one = set[int]()
        whole = {i for i, m in enumerate(messages) if isinstance(m.get("content"), str)}
        if whole and self._takes_no_text:
            whole.clear()
        while True:
            adapted, parts = _adapted(messages, whole, one)
            try:
                text = self._render_once(adapted, add_generation_prompt, now)
            except TakesTextError as e:
                whole |= {i for i in parts if messages[i]["role"] == e.role}
            except InputError:
                # It may have mistaken parts for a text; a user's parts are not the reason if the template reads parts.
                taken = {i for i in parts if messages[i]["role"] != "user" or not self._reads_parts}
                if not taken:
                    raise
                whole |= taken
            else:
                unread = {i for i, content in parts.items() if not was_read(content)}
                some = {i for i, content in parts.items() if lost_words(content)}
                if not unread and not some:
                    return text
                whole, one = whole | unread, one | some

    def _render_once(self, messages: list[dict[str, object]], add_generation_prompt: bool, now: datetime) -> str:
        from .sandbox import render

        variables = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return render(self._template, {**self._tokens, **variables}, now)

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template writes content in parts."""
        return self._writes(_adapted([_PROBE], set(), set())[0])

    @cached_property
    def _takes_no_text(self) -> bool:
        """Whether the template drops content that is a text, but writes it as a part."""
        return not self._writes([_PROBE]) and self._reads_parts

    def _writes(self, messages: list[dict[str, object]]) -> bool:
        try:
            return _MARK in self._render_once(messages, False, datetime.now())
        except (BonnxError, TakesTextError):
            return False


def _adapted(
    messages: list[dict[str, object]], whole: set[int], one: set[int]
) -> tuple[list[dict[str, object]], dict[int, ContentParts]]:
    """Messages for a template, the content of those in `whole` as texts, of the others as parts; and these parts.

    Of those in `one` all words are one part.
    """
    adapted, parts = list(messages), dict[int, ContentParts]()
    for i, message in enumerate(messages):
        content = message.get("content")
        if i in whole and isinstance(content, list):
            adapted[i] = {**message, "content": joined(content)}
        elif i not in whole and content is not None:
            words = joined(content) if i in one and isinstance(content, list) else content
            listed = words if isinstance(words, list) else [{"type": "text", "text": words}]
            parts[i] = ContentParts(listed, str(message["role"]))
            adapted[i] = {**message, "content": parts[i]}
    return adapted, parts


def is_messages(value: object) -> TypeGuard[Messages]:
    """Whether a prompt or candidate is meant as messages: a list whose first element is a mapping."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def common_length(a: str, b: str) -> int:
    """Length of the common beginning of two texts."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _plain_messages(messages: Messages, name: str) -> list[dict[str, object]]:
    """Copies as plain JSON values, through which a template can neither change anything nor reach Python objects.

    As in transformers, keys whose value is None are dropped, and other names of `reasoning_content` are accepted.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError(
            f'{name}: expected a list of {{"role": ..., "content": ...}}, not empty; got {shown(messages)}'
        )
    return [_plain_message(message, f"{name}[{i}]") for i, message in enumerate(messages)]


def _plain_message(message: object, name: str) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise InputError(f'{name}: expected {{"role": ..., "content": ...}}; got {shown(message)}')
    plain = {key: value for key, value in _plain_object(message, name, 0).items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise InputError(f"{name}: 'role' must be a text such as 'user'; got {shown(plain.get('role'))}")
    content = plain.get("content")
    if content is None and "tool_calls" not in plain:
        raise InputError(f"{name}: there is no 'content'; got the keys {', '.join(map(repr, plain))}")
    if isinstance(content, list):
        for i, part in enumerate(content):
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise InputError(
                    f"{name}['content'][{i}]: expected {{'type': 'text', 'text': ...}}: only text can be ranked; "
                    f"got {shown(part)}"
                )
    elif content is not None and not isinstance(content, str):
        raise InputError(f"{name}: 'content' must be a text or a list of text parts; got {shown(content)}")
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((plain[name] for name in names if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: object, name: str, depth: int) -> object:
    """A copy of a JSON value."""
    if depth > 50:
        raise InputError(f"{name}: nested more than 50 deep")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value) if type(value) is not kind else value
    if isinstance(value, Mapping):
        return _plain_object(value, name, depth)
    if isinstance(value, (list, tuple)):
        return [_plain(item, name, depth + 1) for item in value]
    raise InputError(f"{name}: expected plain JSON values; got {shown(value)}")


def _plain_object(value: Mapping[object, object], name: str, depth: int) -> dict[str, object]:
    """A copy of a JSON object."""
    for key in value:
        if not isinstance(key, str):
            raise InputError(f"{name}: keys must be texts; got {shown(key)}")
    return {str(key): _plain(item, name, depth + 1) for key, item in value.items()}

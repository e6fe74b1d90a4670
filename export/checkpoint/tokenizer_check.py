"""Check an artifact's tokenizer and chat template against transformers, if it is installed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tokenizers

from bonnx.errors import BonnxError, ExportError
from bonnx.runtime.artifact.manifest import PairRules
from bonnx.runtime.text.chat import ChatTemplate
from bonnx.runtime.text.pair import PairTemplate

from .tokenizer import TextFiles

__all__ = ["check_against_transformers"]

TEXTS = (
    "",
    "x",
    "The answer is 42.",
    "  two spaces, a tab\tand both ends  ",
    "\n\nline\r\n\n  indented\n",
    "12345 + 67,890 = 80235; don't we'll I'M",
    "naïve café e\u0301 Å ½ ﬁ Straße",
    "数学の答えは42です。 Ответ: четыре. الجواب هو",
    "\U0001f9ee \U0001f468\u200d\U0001f469\u200d\U0001f467 ∑∫√ → \u200b\ufeff\u00a0|",
    "def f(x):\n    return x**2  # {{ template }}\n",
    "\\boxed{7} <b>&amp;</b> [INST] <<SYS>>",
    "▁ Ġ <0x0A> \x00\x7f",
)
USER, ASSISTANT = {"role": "user", "content": "What is 6 * 7?"}, {"role": "assistant", "content": "It is 42."}
SYSTEM = {"role": "system", "content": "Think & answer <briefly>."}
THOUGHT = {"role": "assistant", "content": "<think>\n6 * 7\n</think>\n\n  42 \n"}
AGAIN = {"role": "user", "content": " And\n7 * 8? "}
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT],
    [SYSTEM, USER, ASSISTANT],
    [USER, THOUGHT, AGAIN],
    [SYSTEM, USER, THOUGHT, AGAIN, ASSISTANT],
    [ASSISTANT, USER, USER],
    [{"role": "user", "content": [{"type": "text", "text": "What is 6 * 7?"}]}],
)
PAIRS = (
    ("What is 6 * 7?", "It is 42.\n", None),
    (" Who & where <b>?\n", " {{ document }} 数学\n\n", "Find  what\nanswers. "),
)


def check_against_transformers(files: TextFiles, pair: PairRules | None = None) -> str | None:
    """Compare token ids and rendered conversations with those of `AutoTokenizer` for the same folder.

    Args:
        files: the tokenizer.
        pair: how a reranker's template is used, if the checkpoint is one.

    Returns:
        transformers' version, or None if it is not installed or older than 5, whose tokenizers differ.

    Raises:
        ExportError: with the first text or conversation whose result differs.
    """
    try:
        import transformers
    except ImportError:
        return None
    version: str = transformers.__version__
    if int(version.split(".")[0]) < 5:
        return None
    with _quiet(transformers):
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(str(files.folder), local_files_only=True)
        except Exception as e:  # a tokenizer class may raise anything
            raise ExportError(f"{files.folder}: transformers {version} cannot read the tokenizer: {e}") from e
        _check_ids(files, theirs, version)
        if files.chat_template is not None:
            _check_chats(files, files.chat_template, theirs, version)
        if files.pair_template is not None and pair is not None:
            _check_pairs(files, files.pair_template, pair, theirs, version)
    return version


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers' messages about the tokenizer."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


def _check_ids(files: TextFiles, theirs: Any, version: str) -> None:
    ours = tokenizers.Tokenizer.from_str(files.json.decode())
    known = list(dict.fromkeys(token.content for token in ours.get_added_tokens_decoder().values()))
    marked = [f"{piece}{token}{piece}" for token in known[:20] for piece in ("", "a", " b ", "\n")]
    for text in (*TEXTS, *marked, "".join(known[:20]), " ".join(TEXTS)):
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special).ids
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            if ids != expected:
                raise ExportError(
                    f"{files.folder}: the tokenizer returns {ids} for {text!r} (add_special_tokens={special}); "
                    f"expected {expected}, as transformers {version} returns"
                )


def _check_chats(files: TextFiles, source: str, theirs: Any, version: str) -> None:
    template = ChatTemplate(source, files.special_tokens)
    for conversation in CONVERSATIONS:
        for prompted in (False, True):
            for attempt in range(3):  # the rendered text may contain the time of day
                rendered = _ours(template, conversation, prompted)
                expected = _expected(theirs, source, conversation, prompted)
                if rendered == expected:
                    break
                if attempt == 2:
                    raise ExportError(
                        f"{files.folder}: the chat template renders {rendered!r} for {conversation} "
                        f"(add_generation_prompt={prompted}); expected {expected!r}, as transformers {version} renders "
                        "(None: refused)"
                    )


def _check_pairs(files: TextFiles, source: str, rules: PairRules, theirs: Any, version: str) -> None:
    template = PairTemplate(source, files.special_tokens, rules)
    for query, document, instruction in PAIRS:
        for attempt in range(3):  # the rendered text may contain the time of day
            rendered = template.render(query, document, instruction)
            messages, options = template.messages(query, document, instruction), {**rules.options, "border": ""}
            expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
            if rendered == expected:
                break
            if attempt == 2:
                raise ExportError(
                    f"{files.folder}: the template renders {rendered!r} for the query {query!r} and the document "
                    f"{document!r}; expected {expected!r}, as transformers {version} renders"
                )


def _ours(template: ChatTemplate, conversation: list[dict[str, Any]], prompted: bool) -> str | None:
    try:
        return template.render(conversation, add_generation_prompt=prompted)
    except BonnxError:
        return None


def _expected(theirs: Any, source: str, conversation: list[dict[str, Any]], prompted: bool) -> str | None:
    """Render with transformers, passing content as text or as a list of parts, whichever the template supports.

    For the other form, transformers renders nothing, or the list as Python prints it.
    """
    content = conversation[-1]["content"]
    words: str = content if isinstance(content, str) else content[0]["text"]
    rendered = _theirs(theirs, source, conversation, prompted)
    if rendered is not None and words.strip() in rendered and "'text'" not in rendered:
        return rendered
    other = words if isinstance(content, list) else [{"type": "text", "text": words}]
    instead = _theirs(theirs, source, [*conversation[:-1], {**conversation[-1], "content": other}], prompted)
    return instead if instead is not None and words.strip() in instead and "'text'" not in instead else rendered


def _theirs(theirs: Any, source: str, conversation: list[dict[str, Any]], prompted: bool) -> str | None:
    try:
        text: str = theirs.apply_chat_template(
            conversation, chat_template=source, tokenize=False, add_generation_prompt=prompted
        )
    except Exception:  # any exception from a template counts as a refusal
        return None
    return text

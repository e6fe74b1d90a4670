r"""The answer that a text ends in, in a form in which equal answers are equal: what candidates vote for.

`boxed` reads the last \boxed{...}, `number` the last number, `regex:PATTERN` the last match. All take any text: their
time grows with its length only, and they give None where there is no answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from bonnx.errors import InputError

from . import numerals

__all__ = ["boxed", "canonical", "extractor", "number"]

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed)\{")


def extractor(name: str) -> Callable[[str], str | None]:
    """The function that `boxed`, `number` or `regex:PATTERN` stands for.

    Raises:
        InputError: no such extractor, or not a pattern.
    """
    if name in ("boxed", "number"):
        return boxed if name == "boxed" else number
    if not name.startswith("regex:"):
        raise InputError(
            f"answers: expected 'boxed', 'number', 'regex:PATTERN', 'tool' or 'tool-except:FIELD'; got {name!r:.60}"
        )
    try:
        pattern = re.compile(name.removeprefix("regex:"))
    except (re.error, OverflowError, RecursionError) as e:
        raise InputError(f"answers: {name!r:.60} is not a regular expression: {e}") from e
    return lambda text: _last_match(pattern, text)


def boxed(text: str) -> str | None:
    r"""The last \boxed{...} whose braces are balanced, in canonical form."""
    pairs = _braces(text)
    start = max((start for start in pairs if text.endswith(("\\boxed", "\\boxed "), 0, start)), default=None)
    return None if start is None else canonical(text[start + 1 : pairs[start]])


def number(text: str) -> str | None:
    """The last number, in canonical form; `numerals` says what is read."""
    return numerals.last(text)


def canonical(text: str) -> str | None:
    r"""One form for texts that mean the same; None if nothing is left.

    A number, also with a unit or as `x = 5`, becomes a decimal, or a fraction in lowest terms if its decimals never
    end: `numerals` says what is read. Other text loses white space around it, a period at its end, outer $...$,
    \(...\), {...} and \text{...}; white space inside becomes one blank.
    """
    text = _unwrapped(" ".join(text.split()))
    return numerals.read(text) or text or None


def _last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match that is not empty; of a pattern with groups the first group."""
    last = None
    for match in pattern.finditer(text):
        last = canonical(match[1 if pattern.groups else 0] or "") or last
    return last


def _braces(text: str) -> dict[int, int]:
    """Where each balanced brace opens and where it closes; one after a backslash is a character like any other."""
    pairs, opened = {}, []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            pairs[opened.pop()] = brace.start()
    return pairs


def _unwrapped(text: str) -> str:
    """Without periods at the end, outer dollars and text commands, however many."""
    pairs, start, end = _braces(text), 0, len(text)
    while start < end:
        wrapper = _WRAPPER.match(text, start, end)
        if text[start] == " ":
            start += 1
        elif text[end - 1] in " .":
            end -= 1
        elif (text[start] == text[end - 1] == "$" and end - start > 1) or pairs.get(start) == end - 1:
            start, end = start + 1, end - 1
        elif end - start > 3 and (text[start : start + 2], text[end - 2 : end]) in (("\\(", "\\)"), ("\\[", "\\]")):
            start, end = start + 2, end - 2
        elif wrapper is not None and pairs.get(wrapper.end() - 1) == end - 1:
            start, end = wrapper.end(), end - 1
        else:
            break
    return text[start:end]

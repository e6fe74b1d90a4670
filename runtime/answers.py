r"""The answer that a text ends in, in a form in which equal answers are equal: what candidates vote for.

`boxed` reads the last \boxed{...}, `number` the last number, `regex:PATTERN` the last match. All take any text: their
time grows with its length only, and they give None where there is no answer.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from decimal import Context, Decimal, Inexact
from fractions import Fraction

from .errors import InputError

__all__ = ["boxed", "canonical", "extractor", "number"]

_DIGITS = "(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
# A minus after a word, a digit or a bracket subtracts. \frac12 is LaTeX for \frac{1}{2}.
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)\]}}])[-+\u2212])? \\?\$?
    (?: \\[dt]?frac (?: \{{(?P<top>-?{_DECIMAL})\}}\{{(?P<bottom>{_DECIMAL})\}} | (?P<upper>[0-9])(?P<lower>[0-9]) )
      | (?P<whole>{_DECIMAL}) (?: [eE](?P<exponent>[-+]?[0-9]{{1,3}})(?![0-9]) | [ ]?/[ ]?(?P<divisor>{_DECIMAL}) )?
    )
    (?: [ ]?\\?%)?
    """,
    re.VERBOSE,
)
# Longer ones are compared as text. Python refuses to read a few thousand digits, and no answer has so many.
_LONGEST_NUMBER = 300
# Enough for every quotient of two such numbers that ends.
_EXACT = Context(prec=3000, traps=[Inexact])
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{")


def extractor(name: str) -> Callable[[str], str | None]:
    """The function that `boxed`, `number` or `regex:PATTERN` stands for.

    Raises:
        InputError: no such extractor, or not a pattern.
    """
    if name in ("boxed", "number"):
        return boxed if name == "boxed" else number
    if not name.startswith("regex:"):
        raise InputError(f"answers: expected 'boxed', 'number' or 'regex:PATTERN'; got {name!r:.60}")
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
    r"""The last number in canonical form: 1,000 or -2.5 or 3/4 or \frac{3}{4} or $5 or 50% (which is 50) or 6.02e23."""
    last = deque(_NUMBER.finditer(text), maxlen=1)
    return _plain_number(last[0]) if last else None


def canonical(text: str) -> str | None:
    r"""One form for texts that mean the same; None if nothing is left.

    A number becomes a decimal, or a fraction in lowest terms if its decimals never end: 1,000 and 1000.0 are 1000,
    .50 and \frac{1}{2} are 0.5. Other text loses white space around it, a period at its end, outer $...$ and
    \text{...}; white space inside becomes one blank.
    """
    text = _unwrapped(" ".join(text.split()))
    plain = text.replace("{,}", ",").replace("\\!", "").replace("\\,", "")
    found = _NUMBER.fullmatch(plain)
    return (text if found is None else _plain_number(found)) or None


def _last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match that is not empty; of a pattern with groups the first group."""
    last = None
    for match in pattern.finditer(text):
        last = canonical(match[1 if pattern.groups else 0] or "") or last
    return last


def _plain_number(found: re.Match[str]) -> str:
    whole = found[0].replace(",", "")
    if len(whole) > _LONGEST_NUMBER:
        return whole
    top = Fraction((found["whole"] or found["top"] or found["upper"]).replace(",", ""))
    bottom = Fraction((found["divisor"] or found["bottom"] or found["lower"] or "1").replace(",", ""))
    if not bottom:
        return whole
    sign = -1 if found["sign"] in ("-", "\u2212") else 1
    value = sign * top * Fraction(10) ** int(found["exponent"] or 0) / bottom
    try:
        quotient = _EXACT.divide(Decimal(value.numerator), Decimal(value.denominator))
    except Inexact:
        return str(value)
    return format(_EXACT.normalize(quotient), "f")


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
        elif text[start] == text[end - 1] == "$" and end - start > 1:
            start, end = start + 1, end - 1
        elif wrapper is not None and pairs.get(wrapper.end() - 1) == end - 1:
            start, end = wrapper.end(), end - 1
        else:
            break
    return text[start:end]

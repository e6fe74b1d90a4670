r"""Numbers as people and LaTeX write them, in one form: a decimal, or else a fraction in lowest terms.

What is read, alone (`read`) or as the last in a text (`last`), in time that grows with the text's length only:

- signs: `-5`, a Unicode minus, `- 5` where something is expected; `12-3` subtracts;
- thousands in threes, divided by a comma, a point (from two on), an apostrophe, `_`, a space of any width, `{,}`, `\,`;
- decimals with a point, `.5`, `1e5`, `1.5 \times 10^{3}`, `10^6`, `10 ^ (6)`, `10**6`, superscripts, `5 million`;
- `3/4`, `\frac{3}{4}` (`\dfrac`, `\tfrac`, `\frac34`), `½`; mixed, `2 1/2`, `1½`, `2\frac{1}{2}`;
- with `$`, `\$`, `€`, `£`, `¥` before or behind, `%` behind (`50%` is 50).

An exponent or index (`cm^2`, `x_1`) is no number. Ratios, times, dates, versions and what commas divide otherwise
(`3:2`, `2024-05-03`, `1.2.3`, `3,14`, `1.234,56`) are texts of their own, and not their last part. A unit is words of
at least two letters, a degree sign or `\text{...}`: a single letter could be a variable.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Context, Decimal, Inexact
from fractions import Fraction

__all__ = ["last", "read"]

_DECIMAL = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
_CURRENCY = r"(?:(?:US)?\\?\$[ ]?|[€£¥][ ]?)"
# A minus after a word, a digit or a bracket subtracts; one with a space behind it is a sign behind `=` and the like.
_SIGN = r"(?:(?<![\w)\]}])[-+]|(?<=[=(:,{])[-+][ ]|(?<=[=(:,{][ ])[-+][ ])"
_NUMBER = rf"""
    (?<![\^_0-9])(?<![\^_]\{{)(?<!\^[-+])(?<!\^\{{[-+])(?<![0-9]\.)
    {_CURRENCY}? (?P<sign>{_SIGN})? {_CURRENCY}?
    (?: (?P<compound>
          (?!{_DECIMAL}(?![.,]?[0-9]))[0-9]+(?:[.,][0-9]+)+ | [0-9]+(?::[0-9]+)+
        | [0-9]{{4}}-[0-9]{{1,2}}-[0-9]{{1,2}} | [0-9]{{1,4}}(?:/[0-9]{{1,4}}){{2,}}
        ) (?![0-9])
      | (?: (?P<mixed>{_DECIMAL}) [ ]? )? \\[dtc]?frac [ ]?
        (?: \{{[ ]?(?P<top>-?{_DECIMAL})[ ]?\}} | (?P<upper>[0-9]) ) [ ]?
        (?: \{{[ ]?(?P<bottom>{_DECIMAL})[ ]?\}} | (?P<lower>[0-9]) )
      | (?P<whole>{_DECIMAL})
        (?: [eE](?P<exponent>[-+]?[0-9]+)
          | [ ](?P<part>[0-9]+)/(?P<of>[0-9]+)(?![0-9/])
          | [ ]?/[ ]?(?P<divisor>{_DECIMAL})
          | (?:\^|\*\*)(?: \{{(?P<power>[-+]?[0-9]+)\}} | (?P<bare>[-+]?[0-9]+) )
          | [ ]?(?:\\times|\\cdot|[x*\xd7\xb7])[ ]?10\^
            (?: \{{(?P<ten>[-+]?[0-9]+)\}} | (?P<tens>[-+]?[0-9]+) )
        )?
    )
    (?: [ ](?P<scale>thousand|million|billion|trillion)\b )?
    (?: [ ]?(?:\\?%|[€£¥]) )?
"""
_NUMBERS = re.compile(_NUMBER, re.VERBOSE)
# Words that go on with what a number began, so that it is not a quantity.
_WORD = r"(?!(?:pi|or|and|to|mod|sqrt|sin|cos|tan|log|ln|exp|times|plus|minus|over)\b)[^\W\d_]"
_POWER = r"(?:\^(?:\{-?[0-9]\}|-?[0-9]))?"
_UNIT = rf"""
    [ ]? (?: \^(?:\{{\\circ\}}|\\circ) | ° | \\degree ) [ ]? [CFK]?
  | (?: [ ]?\\(?:text|textrm|textbf|mathrm|mbox|operatorname)\{{[^{{}}0-9\\]*\}}{_POWER} )+
  | [ ]{_WORD}{{2,}}{_POWER}(?:[ /·]{_WORD}+{_POWER})*
"""
_QUANTITY = re.compile(rf"{_NUMBER} (?:{_UNIT})?", re.VERBOSE)
_NAME = re.compile(r"\s*[^\W\d_\\][^=]*=\s*")
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}

_SPACES = "\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_CHARACTERS = str.maketrans(
    {
        "\u2212": "-",
        "\ufe63": "-",
        "\uff0d": "-",
        "\u2012": "-",
        "\u2013": "-",
        "\u2044": "/",
        "\uff04": "$",
        "\uff05": "%",
    }
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
    | dict.fromkeys(_SPACES, " ")
)
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207a"
_LOWERED = str.maketrans(_RAISED, "0123456789-+")
_SUPERSCRIPTS = re.compile(f"[{_RAISED}]+")
_VULGAR_FRACTIONS = "½1/2 ⅓1/3 ⅔2/3 ¼1/4 ¾3/4 ⅕1/5 ⅖2/5 ⅗3/5 ⅘4/5 ⅙1/6 ⅚5/6 ⅐1/7 ⅛1/8 ⅜3/8 ⅝5/8 ⅞7/8 ⅑1/9 ⅒1/10"
_VULGAR = {entry[0]: entry[1:] for entry in _VULGAR_FRACTIONS.split()}
_VULGARS = re.compile(f"([0-9]?)([{''.join(_VULGAR)}])")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,;:! ]|[ '\u2019_~])(?=[0-9]{3}(?![0-9]|[ ]?/))")
_POINTS = re.compile(r"[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}")
# Blanks and brackets that may stand around an exponent. Two asterisks beside a number may be bold text in Markdown.
_RAISING = re.compile(r" ?\^ ?(?:\{ ?([-+]?[0-9]+) ?\}|\( ?([-+]?[0-9]+) ?\)|([-+]?[0-9]+))")
_ASTERISKS = re.compile(r"(?<=[0-9]) \*\* (?=[-+]?[0-9])")
# Longer ones are compared as text. Python refuses to read a few thousand digits, and no answer has so many.
_LONGEST = 300
# Enough for every quotient of two such numbers that ends.
_EXACT = Context(prec=3000, traps=[Inexact])


def last(text: str) -> str | None:
    """The last number of a text, in its form; None if there is none."""
    match = deque(_NUMBERS.finditer(_plain(text)), maxlen=1)
    return _form(match[0], alone=False) if match else None


def read(text: str) -> str | None:
    """The number that a text is, perhaps with a unit behind it or `x =` before it, in its form; None if it is none."""
    text = _plain(text)
    name = _NAME.match(text)
    text = text[name.end() :] if name else text
    text = re.sub(r"^([-+]) (?=\S)", r"\1", text)
    match = _QUANTITY.fullmatch(text)
    return None if match is None else _form(match, alone=True)


def _plain(text: str) -> str:
    """With one character or command for what may be written in many ways."""
    text = text.translate(_CHARACTERS)
    text = _SUPERSCRIPTS.sub(lambda match: "^{" + match[0].translate(_LOWERED) + "}", text)
    text = _RAISING.sub(lambda match: "^" + (match[3] or f"{{{match[1] or match[2]}}}"), text)
    text = _ASTERISKS.sub("**", text)
    text = _VULGARS.sub(_written_out, text)
    return _THOUSANDS.sub(",", text)


def _written_out(match: re.Match[str]) -> str:
    return f"{match[1]}{' ' if match[1] else ''}{_VULGAR[match[2]]}"


def _form(match: re.Match[str], *, alone: bool) -> str | None:
    compound = match["compound"]
    sign = "-" if (match["sign"] or "").startswith("-") else ""
    if compound is not None and not _POINTS.fullmatch(compound):
        return sign + compound
    whole = match[0].replace(",", "").strip()
    if len(whole) > _LONGEST:
        return whole
    value = Fraction(compound.replace(".", "")) if compound is not None else _value(match, alone=alone)
    if value is None:
        return None if alone else whole
    value *= 10 ** _SCALES.get(match["scale"] or "", 0)
    value = -value if sign else value
    try:
        quotient = _EXACT.divide(Decimal(value.numerator), Decimal(value.denominator))
    except Inexact:
        return str(value)
    return format(_EXACT.normalize(quotient), "f")


def _value(match: re.Match[str], *, alone: bool) -> Fraction | None:
    """Without its sign; None if it divides by zero or is too large, or is no number of its own."""

    def number(*names: str) -> Fraction:
        return Fraction(next(match[name] for name in names if match[name]).replace(",", ""))

    if match["whole"] is None:
        top, bottom = number("top", "upper"), number("bottom", "lower")
        if not bottom:
            return None
        return top / bottom + (number("mixed") if match["mixed"] else 0)
    value = number("whole")
    if match["part"]:
        part, of = number("part"), number("of")
        if not of or (alone and part >= of):
            return None
        return value + part / of if part < of else part / of
    if match["divisor"]:
        return value / number("divisor") if number("divisor") else None
    raised = match["power"] or match["bare"]
    if raised:
        power = int(raised)
        fits = abs(power) * len(match["whole"]) <= 1000 and (value or power >= 0)
        return Fraction(value**power) if fits else None
    power = int(match["exponent"] or match["ten"] or match["tens"] or 0)
    return value * Fraction(10) ** power if abs(power) < 1000 else None

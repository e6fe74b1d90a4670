"""Answers in texts: what is found, which are equal, and that no text is too much for them."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bonnx import InputError
from bonnx.runtime.selection.answers import boxed, canonical, extractor, number

EXTRACTORS = [boxed, number, canonical, extractor(r"regex:answer:?\s(\S+)"), extractor("regex:[0-9]+|[a-z]+")]
# Pieces that mean something to an extractor, in any order.
PIECES = ["\\boxed", "\\boxed{", "{", "}", "\\{", "\\", "$", "\\$", "\\text{", "\\frac{", "\\frac12", "}{", ",", "{,}"]
PIECES += [
    "\\%",
    "%",
    ".",
    "..",
    "-",
    "+",
    "/",
    " / ",
    "0",
    "1",
    "007",
    "1,000",
    "000",
    "e5",
    "e-999",
    "E",
    "x",
    " ",
    "\n",
]
PIECES += [
    "^",
    "^{",
    "_",
    "10^",
    " 000",
    "'000",
    "\\,",
    "½",
    "²",
    "⁻",
    " 1/2",
    ":",
    "e",
    "\\times 10^3",
    "US$",
    "€",
    " cm",
    "=",
]
HOSTILE = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join)


@pytest.mark.parametrize(
    ("group", "form"),
    [
        (["1,000", "1000", "1000.0", " 1000. ", "$1000$", "\\$1,000", "1{,}000", "1\\,000", "1e3", "+1000"], "1000"),
        (["0.50", ".5", "1/2", "\\frac{1}{2}", "\\dfrac{1}{2}", "\\frac12", "2/4", "0.5%", "$\\frac{2}{4}$."], "0.5"),
        (["-3", "\u22123", "-3.0", "-$3", "-6/2", "\\frac{-3}{1}", "\\text{-3}"], "-3"),
        (["1/3", "2/6", "\\tfrac{1}{3}", "0.5/1.5"], "1/3"),
        (["0", "-0", "0.000", "0/7"], "0"),
        (["x + 1", " x  +\n1.", "$x + 1$", "\\text{x + 1}", "$\\textbf{ x + 1 }$", "$$x + 1$$"], "x + 1"),
        (["1/0"], "1/0"),
        (["(1,2)", "$(1,2)$"], "(1,2)"),
        (["12,34"], "12,34"),
        (["1e99999"], "1e99999"),
        (["", " ", ".", "$$", "\\text{}", "\\text{ . }"], None),
    ],
)
def test_equal_answers_have_one_form(group, form):
    assert {canonical(text) for text in group} == {form}


@given(
    value=st.fractions(max_denominator=10**6) | st.decimals(-(10**6), 10**6, places=4).map(Fraction),
    style=st.integers(0, 3),
    zeros=st.integers(0, 4),
)
def test_any_spelling_of_a_number(value, style, zeros):
    sign, size = ("-" if value < 0 else ""), abs(value)
    whole = f"{size.numerator:,}" if style % 2 else str(size.numerator)
    spelled = [f"{sign}{whole}/{size.denominator}", f"{sign}\\frac{{{whole}}}{{{size.denominator}}}"][style // 2]
    form = canonical(spelled)
    assert Fraction(form) == value
    assert canonical(form) == form
    assert number(f"so it is {spelled}. Done.") == form
    assert boxed(f"so \\boxed{{{spelled}}} or {style}") == form
    if "/" not in form:
        longer = (form if "." in form else form + ".") + "0" * zeros
        assert canonical(f"${longer}$") == form


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 and 4, so 7.", "7"),
        ("12-3=9", "9"),
        ("from 12-3", "3"),
        ("x = -3", "-3"),
        ("it costs $1,234.50.", "1234.5"),
        ("about 3/4 of them", "0.75"),
        ("growth of 12.5%", "12.5"),
        ("so \\frac{3}{8} of it", "0.375"),
        ("1.5e-3 m", "0.0015"),
        ("nothing", None),
        ("\u0661\u0662", None),
    ],
)
def test_the_last_number(text, answer):
    assert number(text) == answer


# The same number in a box, in a text and alone.
SPELLINGS = {
    "9500": [
        "9500",
        "$9{,}500",
        "\\$9{,}500",
        "9\\,500",
        "9,\\!500",
        "9 500",
        "9\u2009500",
        "9\u202f500",
        "9\u00a0500",
        "9'500",
        "9_500",
        "9.5e3",
        "9.5 \\times 10^3",
        "9.5\\cdot10^{3}",
        "9.5 \u00d7 10\u00b3",
        "9.5 thousand",
        "\uff19500",
        "9500.0 \u20ac",
        "9500 dollars",
        "9500\\text{ km}",
        "9{,}500 cm^2",
        "9500 cm\u00b2",
        "9500^\\circ",
        "9500\u00b0",
        "US$9,500.00",
        "{9500}",
        "x = 9500",
        "\\(9500\\)",
        "\\text{9500}",
        "\\boxed{9500}",
        "9500\\%",
        "9500 %",
    ],
    "12000": ["12\\,000", "12\\ 000", "12~000", "12 000"],
    "2.5": [
        "2 1/2",
        "2\u00bd",
        "2 \u00bd",
        "2\\frac{1}{2}",
        "2 \\tfrac12",
        "5/2",
        "5\u20442",
        "\\dfrac{5}{2}",
        "\\frac 5{2}",
        "\\frac{ 5 }{ 2 }",
        "$2\\frac{1}{2}$",
        "2.50",
        "25 \\times 10^{-1}",
    ],
    "-2.5": ["-2 1/2", "\u22122\u00bd", "-\\frac{5}{2}", "\\frac{-5}{2}", "x = - 2.5", "$-2.5", "-$2.5", "y=-2.5"],
    "1000000": [
        "10^6",
        "10^{6}",
        "10**6",
        "10\u2076",
        "1e6",
        "1.000.000",
        "1 000 000",
        "1,000,000",
        "1 million",
        "1000^2",
    ],
    "1/3": ["1/3", "\u2153", "2/6", "\\cfrac{1}{3}", "\\frac13"],
    "0.01": ["10^{-2}", "10\u207b\u00b2", "1e-2", "0.01", "1/100"],
    "3:2": ["3:2"],
    "2024-05-03": ["2024-05-03"],
    "3/5/2024": ["3/5/2024"],
    "1.2.3": ["1.2.3"],
    "3,14": ["3,14"],
}


@pytest.mark.parametrize(
    ("form", "spelled"), [(form, each) for form, spellings in SPELLINGS.items() for each in spellings]
)
def test_numbers_are_read_alike_in_boxes_and_in_texts(form, spelled):
    assert boxed(f"so \\boxed{{{spelled}}}, as 3 said") == form
    assert number(f"After 12 steps it is {spelled}.") == form
    assert canonical(spelled) == form


@pytest.mark.parametrize(
    "text", ["5x", "2 pi", "2\\sqrt{3}", "x^2", "5 or 6", "5!", "5 m", "1, 2", "2 3/2", "x + 1 = y", "\\pm 5"]
)
def test_what_is_no_number_stays_a_text(text):
    assert boxed(f"\\boxed{{{text}}}") == text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7 cm^2", "7"),
        ("7 cm^{2}", "7"),
        ("3 m^{-1}", "3"),
        ("6 = a_1", "6"),
        ("5 x^12", "5"),
        ("2 3/2", "1.5"),
        ("from 12 - 3", "3"),
        ("- 5 apples", "5"),
        ("1. one\n2. two", "2"),
        ("it is 1,000, or so", "1000"),
        ("in 2^99999 ways", "2^99999"),
        ("about 1e99999", "1e99999"),
        ("50 percent", "50"),
        ("so the answer is...5", "5"),
        ("see No.5", "5"),
        ("10 ^ 6", "1000000"),
        ("10^{ -2 }", "0.01"),
        ("10^(3) m", "1000"),
        ("10 ** 6", "1000000"),
        ("not 12 but **42**", "42"),
        ("not 12 **42**", "42"),
        ("about 1.234,56 euros", "1.234,56"),
        ("1,234.56.78", "1,234.56.78"),
        ("x = -3,14", "-3,14"),
    ],
)
def test_the_last_number_of_more(text, answer):
    assert number(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{4}}", "0.25"),
        ("\\boxed{a_{1}} and \\boxed{b", "a_{1}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed {5}", "5"),
        ("\\boxed{ }", None),
        ("boxed{5}", None),
        ("\\boxed{", None),
    ],
)
def test_the_last_box(text, answer):
    assert boxed(text) == answer


def test_the_last_match():
    assert extractor("regex:answer is (\\S+)")("The answer is 1,0. No, the answer is 2.50.") == "2.5"
    assert extractor("regex:[A-D]")("A or C") == "C"
    assert extractor("regex:.+")("first\nlast\n") == "last"
    assert extractor("regex:.*")("first") == "first"
    assert extractor("regex:x|(y)")("x") is None
    assert extractor("boxed") is boxed
    assert extractor("number") is number


@pytest.mark.parametrize("name", ["Boxed", "", "regex", "regex:(", "regex:a{9999999999999}"])
def test_no_such_extractor(name):
    with pytest.raises(InputError, match="answers: "):
        extractor(name)


def slow_boxed(text):
    """From the last box to the first, each read until its brace closes; quadratic."""
    for start in range(len(text), -1, -1):
        if text.startswith(("\\boxed{", "\\boxed {"), start):
            depth, i = 0, text.index("{", start)
            for end in range(i, len(text)):
                escaped = (len(text[:end]) - len(text[:end].rstrip("\\"))) % 2
                depth += 0 if escaped else {"{": 1, "}": -1}.get(text[end], 0)
                if depth == 0:
                    return canonical(text[i + 1 : end])
    return None


@pytest.mark.parametrize("extract", EXTRACTORS, ids=["boxed", "number", "canonical", "answer", "words"])
@given(text=HOSTILE)
def test_any_text_has_one_form_or_none(extract, text):
    form = extract(text)
    assert form is None or (form == form.strip() and form)
    if form is not None:
        assert canonical(form) == form


@given(HOSTILE)
def test_boxed_is_the_slow_search_from_the_end(text):
    assert boxed(text) == slow_boxed(text)


LONG = ["\\boxed{", "{", "}", "\\boxed{1}", "\\text{", "\\text{}", "$", ".", "1", "1,000,", "000,", "1/", "1.", "1 / "]
LONG += [
    "1:",
    "1/2 ",
    "2½",
    "10^",
    "^{",
    "²",
    "x=",
    " cm",
    " a",
    "\\text{a}",
    "1'000",
    "1.000",
    "1 \\times 10^",
    "- ",
    "= - ",
    "$ ",
]
LONG += ["\\frac{1}{", "\\frac{11111", "-", "1e", " ", "%", "\\", "\\frac", "1,", "$-", "9" * 999 + " "]


@pytest.mark.parametrize("piece", LONG)
def test_long_texts(piece):
    text = piece * (50_000 // len(piece))
    for extract in (boxed, number, canonical):
        for hostile in (text, text + "x", "1" + text, "\\boxed{" + text + "}", "\\text{" * 1000 + text + "}" * 1000):
            form = extract(hostile)
            assert form is None or isinstance(form, str)


def test_more_digits_than_python_reads():
    digits = "7" * 5000
    assert number(f"it is {digits}.") == canonical(digits) == boxed(f"\\boxed{{{digits}}}") == digits
    assert canonical(f"{digits}/{digits}") == f"{digits}/{digits}"

"""The page: one file, nothing is fetched, readable on a phone and on paper."""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path

import jinja2

from .curves import picture
from .read import Report, SearchRecord

__all__ = ["ENDINGS", "MARKS", "one_line", "page", "say_number", "say_prompt"]

# From unlikely to likely: a ramp that is read by its lightness alone, light enough for dark text at both ends.
RAMP = ("#f4b183", "#f8dcc4", "#f7f7f7", "#c3dcee", "#7fb2d9")
MARKS = {"kept": "↓ kept", "dropped": "✗ dropped", "finished": "■ finished", "cut": "… cut off", "pruned": "✂ pruned"}
ENDINGS = {
    "stop": "ended",
    "length": "cut at the longest length",
    "pruned": "given up: pruned",
    "deadline": "cut at the deadline",
}
_WORDS = {
    "score": "what the scorer says of a text: how likely it is to be right, or how good it is. Each token's background "
    "shows the score at that token.",
    "weighted": "weighted vote: candidates with the same answer add up their weights, the answer with most wins.",
    "majority": "majority vote: the answer of most candidates wins.",
    "borda": "Borda vote: the candidates that the model was most sure of give most points to their answers.",
    "beam": "beam search: after every step only the best pieces continue, each with several next steps.",
    "lookahead": "lookahead: a step is judged by the score a few steps later. What was looked at stands in italics.",
    "dvts": "DVTS: several small beam searches that know nothing of each other.",
    "pruned": "pruned: candidates that fell behind were given up before their end.",
    "adaptive": "adaptive: sampling stopped when one more candidate was not worth its price.",
    "revisions": "revisions: each attempt was written with the earlier ones of its chain in view.",
    "interval": "bands and thin lines: 95% intervals. Where two overlap widely, the difference may be chance.",
}


def page(report: Report, title: str = "What the search did") -> str:
    """The page as HTML.

    Raises:
        InputError: there are figures, and matplotlib is not installed.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "number": say_number, "prompt": say_prompt, "shown": one_line, "colour": _colour,
        "endings": ENDINGS, "marks": MARKS, "ramp": RAMP,
    }  # fmt: skip
    figures = [(figure, picture(figure)) for figure in report.figures]
    searches = [(search, search.range(), _children(search), search.winning()) for search in report.searches]
    parts = []
    if figures:
        parts.append(f"{len(figures)} figure{'s' * (len(figures) > 1)}")
    if searches:
        parts.append(f"{len(searches)} search{'es' * (len(searches) > 1)}, each with its candidates, the winner first")
    return environment.get_template("page.html.jinja").render(
        title=title,
        lead=f"{' and '.join(parts)}." if parts else "An empty run.",
        words=_words(report),
        figures=figures,
        searches=searches,
        left_out=report.left_out,
    )


def _words(report: Report) -> list[tuple[str, str]]:
    """The words on the page that a newcomer needs explained."""
    words = {word for search in report.searches for word in ("score", search.method, search.vote)}
    words |= {"pruned" for search in report.searches for node in search.nodes if node.fate == "pruned"}
    words |= {"interval"} if report.figures else set()
    return [(word, meaning) for word, meaning in _WORDS.items() if word in words]


def _children(search: SearchRecord) -> dict[int | None, list[int]]:
    children: dict[int | None, list[int]] = {None: [], **{i: [] for i in range(len(search.nodes))}}
    for i, node in enumerate(search.nodes):
        children[node.parent].append(i)
    return children


def say_number(value: float | None) -> str:
    """Three digits; a dash for none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.3g}"


def say_prompt(prompt: object) -> str:
    """A prompt in one line."""
    if isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt):
        prompt = " / ".join(f"{turn.get('role', '?')}: {turn.get('content', '')}" for turn in prompt)
    return one_line(str(prompt))


def one_line(text: str) -> str:
    """Line ends as signs, and so what would move the cursor or turn the direction of writing."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎"
    # Controls and marks of direction: a text could hide behind them.
    return f"\\u{ord(character):04x}" if unicodedata.category(character) in ("Cc", "Cf") else character


def _colour(score: float | None, span: tuple[float, float]) -> str:
    if score is None:
        return "#ffffff"
    low, high = span
    place = (len(RAMP) - 1) * (0.5 if high == low else min(1.0, max(0.0, (score - low) / (high - low))))
    left = min(int(place), len(RAMP) - 2)
    parts = [
        round(int(a, 16) + (place - left) * (int(b, 16) - int(a, 16)))
        for a, b in ((RAMP[left][k : k + 2], RAMP[left + 1][k : k + 2]) for k in (1, 3, 5))
    ]
    return "#" + "".join(f"{part:02x}" for part in parts)

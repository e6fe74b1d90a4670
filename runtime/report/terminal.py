"""A search in a terminal: its tree, its candidates, and what it cost."""

from __future__ import annotations

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from .page import ENDINGS, MARKS, one_line, say_number, say_prompt
from .read import CandidateRecord, NodeRecord, SearchRecord

__all__ = ["show"]


def show(console: Console, search: SearchRecord) -> None:
    """Print one search."""
    span = search.range()
    settings = ", ".join(f"{name} {value}" for name, value in search.options.items())
    console.print(Text(say_prompt(search.prompt), style="bold"))
    console.print(Text(f"{search.method}: {settings}; vote: {search.vote}"))
    if search.is_tree:
        console.print(_tree(search, span))
    table = Table(box=None, pad_edge=False)
    for name in ("", "#", "score", "tokens", "end", "candidate"):
        table.add_column(name, justify="right" if name in ("#", "score", "tokens") else "left", overflow="fold")
    for i in search.ranked():
        candidate = search.candidates[i]
        best = i == search.best_index
        row = ("*" if best else "", str(i), say_number(candidate.score), str(len(candidate.pieces)))
        ending = ENDINGS.get(candidate.finish_reason, candidate.finish_reason)
        table.add_row(*row, ending, _coloured(candidate, span), style="bold" if best else None)
    console.print(table)
    cost = ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in search.cost.items())
    console.print(Text(cost, style="dim"))


def _tree(search: SearchRecord, span: tuple[float, float]) -> Tree:
    won = search.winning()
    root = Tree("", hide_root=True)
    places: dict[int | None, Tree] = {None: root}
    for i, node in enumerate(search.nodes):
        label = _coloured(node, span)
        label.append(f"  {say_number(node.score)} {MARKS[node.fate]}", "bold green" if i in won else "dim")
        if node.lookahead:
            label.append(f"  {one_line(node.lookahead)}", "italic dim")
        places[i] = places[node.parent].add(label)
    return root


def _coloured(row: CandidateRecord | NodeRecord, span: tuple[float, float]) -> Text:
    """The text, each token from red over white to blue by its score."""
    low, high = span
    text = Text()
    for piece, score in zip(row.pieces, row.scores, strict=True):
        style = Style()
        if score is not None and high > low:
            share = (score - low) / (high - low)
            style = Style(color="red" if share < 1 / 3 else "blue" if share > 2 / 3 else None)
        text.append(one_line(piece), style)
    return text

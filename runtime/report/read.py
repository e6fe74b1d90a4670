"""A run's folder: `figures.json`, curves with intervals, and `searches.jsonl`, one search a line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from bonnx.errors import InputError

__all__ = [
    "FIGURES",
    "SEARCHES",
    "CandidateRecord",
    "Figure",
    "NodeRecord",
    "Point",
    "Report",
    "SearchRecord",
    "Series",
    "read_run",
]

# A value of JSON; what is in a list or an object, msgspec need not check.
_Json: TypeAlias = str | float | bool | list[object] | dict[str, object] | None

FIGURES, SEARCHES = "figures.json", "searches.jsonl"


class Point(msgspec.Struct, frozen=True):
    """A value and its 95% interval."""

    x: float | str
    y: float
    low: float | None = None
    high: float | None = None


class Series(msgspec.Struct, frozen=True):
    """One line, or one kind of bar."""

    name: str
    points: list[Point]


class Figure(msgspec.Struct, frozen=True):
    """Lines over numbers, or bars over categories."""

    id: str
    title: str
    caption: str
    x_label: str
    y_label: str
    x_scale: Literal["log2", "linear", "category"]
    series: list[Series]


class CandidateRecord(msgspec.Struct, frozen=True):
    """A completion among which the search chose; `node` is its last piece."""

    pieces: list[str]
    scores: list[float | None]
    score: float | None
    finish_reason: str
    node: int
    text: str | None = None
    answer: str | None = None
    group_score: float | None = None
    right: bool | None = None


class NodeRecord(msgspec.Struct, frozen=True):
    """A piece that was generated, and what happened to it."""

    parent: int | None
    pieces: list[str]
    scores: list[float | None]
    score: float | None
    round: int
    fate: Literal["kept", "dropped", "finished", "cut", "pruned"]
    lookahead: str | None = None


class SearchRecord(msgspec.Struct, frozen=True):
    """A search as `SearchResult.to_record` writes it."""

    prompt: _Json
    method: str
    options: dict[str, _Json]
    best_index: int
    vote: str
    candidates: list[CandidateRecord]
    nodes: list[NodeRecord]
    cost: dict[str, float]
    policy: dict[str, _Json] | None = None

    @property
    def is_tree(self) -> bool:
        """Whether pieces follow on pieces."""
        return any(node.parent is not None for node in self.nodes)

    def ranked(self) -> list[int]:
        """Candidates, the winner first, then by score."""
        scores = [-math.inf if c.score is None else c.score for c in self.candidates]
        return sorted(range(len(scores)), key=lambda i: (i != self.best_index, -scores[i]))

    def winning(self) -> set[int]:
        """The pieces of the winner."""
        winning, node = set[int](), self.candidates[self.best_index].node
        place: int | None = node if node >= 0 else None
        while place is not None:
            winning.add(place)
            place = self.nodes[place].parent
        return winning

    def range(self) -> tuple[float, float]:
        """Minimum and maximum score of a token: 0 and 1 if they are probabilities."""
        scores = [s for part in (self.candidates, self.nodes) for row in part for s in row.scores if s is not None]
        low, high = min(scores, default=0.0), max(scores, default=1.0)
        return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


@dataclass(frozen=True)
class Report:
    """The contents of a report.

    Attributes:
        figures: all of them.
        searches: the first ones.
        left_out: how many more there are.
    """

    figures: list[Figure]
    searches: list[SearchRecord]
    left_out: int


def read_run(folder: Path, most: int = 50) -> Report:
    """Read a run; of its searches the first `most`.

    Raises:
        InputError: neither file is there, or one of them is not as it should be: its line and field are named.
    """
    figures, searches = folder / FIGURES, folder / SEARCHES
    if not figures.is_file() and not searches.is_file():
        raise InputError(
            f"{folder}: expected {FIGURES} or {SEARCHES}; `bonnx generate --method ... --save {folder}` writes searches"
        )
    records, left_out = list[SearchRecord](), 0
    try:
        drawn = msgspec.json.decode(figures.read_bytes(), type=list[Figure]) if figures.is_file() else []
    except msgspec.MsgspecError as e:
        raise InputError(f"{figures}: {e}") from e
    if searches.is_file():
        with searches.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if len(records) < most:
                    records.append(_search(line, f"{searches}, line {number}"))
                else:
                    left_out += 1
    return Report(drawn, records, left_out)


def _search(line: bytes, where: str) -> SearchRecord:
    try:
        search = msgspec.json.decode(line, type=SearchRecord)
    except msgspec.MsgspecError as e:
        raise InputError(f"{where}: {e}") from e
    count = len(search.candidates)
    if not 0 <= search.best_index < count:
        raise InputError(f"{where}: best_index: expected an index of {count} candidates; got {search.best_index}")
    rows: list[tuple[str, CandidateRecord | NodeRecord]] = [
        (f"candidates[{i}]", row) for i, row in enumerate(search.candidates)
    ]
    for name, row in [*rows, *((f"nodes[{i}]", node) for i, node in enumerate(search.nodes))]:
        if len(row.pieces) != len(row.scores):
            raise InputError(f"{where}: {name}: {len(row.pieces)} pieces, but {len(row.scores)} scores")
    for i, node in enumerate(search.nodes):
        if node.parent is not None and not 0 <= node.parent < i:
            raise InputError(f"{where}: nodes[{i}].parent: expected an earlier node; got {node.parent}")
    for i, candidate in enumerate(search.candidates):
        if not -1 <= candidate.node < len(search.nodes):
            raise InputError(f"{where}: candidates[{i}].node: expected an index of a node; got {candidate.node}")
    return search

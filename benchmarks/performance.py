"""Draw the tables and the plot of docs/performance.md from the record: `python -m benchmarks.performance`.

A table of the page stands between two comments, of which the first says what it shows: the benchmark, its runs, and the
size that the columns are for, with the values of other sizes where figures have to be chosen:

    <!-- table: long 2026-11-27T01:05:12Z by prompt, n=4 -->
    <!-- end of table -->

So a new run shows on the page when its time is written there. The plot shows the first table of each benchmark and
size. The text around is by hand.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .performance_plot import Panel, draw, panel_of
from .record import MEASUREMENTS, ROOT, read_runs

WIDTH = 125
# Above this load, a table says that other work ran.
BUSY = 0.5
PAGE, PLOT = ROOT / "docs/performance.md", ROOT / "docs/performance.svg"
_TABLE = re.compile(
    r"<!-- table: (?P<benchmark>\w+) (?P<runs>[^>]+?) by (?P<column>\w+)(?P<where>(?:, \w+=\d+)*) -->\n"
    r".*?<!-- end of table -->",
    re.DOTALL,
)
# The rows of each value, in this order, and how a cell shows it.
_VALUES = {
    "seconds": ("{way}", "{:.3f}", 1),
    "share_of_rate": ("share of the matrix rate, {way}", "{:.0f}%", 100),
    "share_of_floor": ("floor's share of the time, {way}", "{:.0f}%", 100),
    "megabytes": ("memory of the call in MB, {way}", "{:.0f}", 1),
}
_SIZES = {"n": "N = {}", "prompt": "prompt of {}", "length": "candidates of {}"}

Runs = dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """What a comment of the page asks for, with its runs: their figures, and what they were measured on."""

    benchmark: str
    column: str
    figures: list[dict[str, Any]]
    runs: list[dict[str, Any]]


def read_table(match: re.Match[str], runs: Runs) -> Table:
    """Read the comment above a table.

    Raises:
        SystemExit: the record has no such run, or no such figures.
    """
    keys = [(match["benchmark"], run.strip()) for run in match["runs"].split(" and ")]
    if missing := [run for run in keys if run not in runs]:
        raise SystemExit(f"{match[0].splitlines()[0]}: {MEASUREMENTS.name} has no run {missing}")
    where = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", match["where"])}
    figures = [f for key in keys for f in runs[key]["figures"] if where.items() <= f.items() and match["column"] in f]
    cells = [(f["way"], f[match["column"]]) for f in figures]
    if not cells or len(cells) > len(set(cells)):
        raise SystemExit(f"{match[0].splitlines()[0]}: {len(cells)} figures for {len(set(cells))} cells")
    return Table(match["benchmark"], match["column"], figures, [runs[key] for key in keys])


def drawn(page: str, runs: Runs) -> str:
    """Return the page with its tables as the record gives them."""

    def replace(match: re.Match[str]) -> str:
        table = read_table(match, runs)
        sources = "\n".join(textwrap.fill(f"- {measured_on(run)}", WIDTH, subsequent_indent="  ") for run in table.runs)
        parts = [match[0].splitlines()[0], rows(table.figures, table.column), f"Measured:\n\n{sources}"]
        return "\n\n".join([*parts, "<!-- end of table -->"])

    if len(_TABLE.findall(page)) != page.count("<!-- table: "):
        raise SystemExit(f"a table of the page is not as {Path(__file__).name} says at its top, or does not end")
    return _TABLE.sub(replace, page)


def rows(figures: list[dict[str, Any]], column: str) -> str:
    """Return figures as a Markdown table: seconds of each way by a size, then the other values."""
    columns = sorted({figure[column] for figure in figures})
    cells: dict[str, dict[tuple[str, int], float]] = {value: {} for value in _VALUES}
    for figure in figures:
        for value in _VALUES.keys() & figure.keys():
            cells[value][figure["way"], figure[column]] = figure[value]
    lines = [f"| seconds | {' | '.join(_SIZES[column].format(c) for c in columns)} |", f"|---|{'---|' * len(columns)}"]
    for value, (name, form, factor) in _VALUES.items():
        for way in dict.fromkeys(way for way, _ in cells[value]):
            found = (cells[value].get((way, c)) for c in columns)
            shown = ("-" if x is None else form.format(factor * x) for x in found)
            lines.append(f"| {name.format(way=way)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def measured_on(run: Mapping[str, Any]) -> str:
    """Return one sentence: command, machine, versions, rates and commit; what the record does not know is left out."""
    parts = [f"`{run['command']}`", f"{run['cores']} cores of {run['processor']}"]
    if run["flags"]:
        parts[-1] += f" ({', '.join(run['flags'])})"
    if run["versions"]:
        parts.append(", ".join(f"{name} {version}" for name, version in run["versions"].items()))
    if run["rates"]:
        units = {"memory": "GB/s"}
        parts.append(
            ", ".join(f"{name} {rate:.0f} {units.get(name, 'GFLOP/s')}" for name, rate in run["rates"].items())
        )
    if (run.get("load") or 0) > BUSY:
        parts.append(f"other work ran, {run['load']:.1f} processes")
    if run["commit"]:
        parts.append(f"commit {run['commit'][:8]}{' with changes' if run['modified'] else ''}")
    if run.get("note"):
        parts.append(run["note"])
    return f"{'; '.join(parts)}."


def panels(page: str, runs: Runs) -> list[Panel]:
    """Return what the plot shows: of the tables that have the same panel, the first on the page."""
    tables: dict[tuple[str, str], Table] = {}
    for match in _TABLE.finditer(page):
        table = read_table(match, runs)
        tables.setdefault((table.benchmark, table.column), table)
    return [panel for table in tables.values() if (panel := panel_of(table.benchmark, table.column, table.figures))]


def main() -> None:
    """Draw the page and its plot again."""
    runs, page = read_runs(), PAGE.read_text(encoding="utf-8")
    PAGE.write_text(drawn(page, runs), encoding="utf-8")
    draw(panels(page, runs), PLOT)


if __name__ == "__main__":
    main()

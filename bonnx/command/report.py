"""`bonnx report`: a search run as one page for a browser, or in the terminal."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from bonnx.runtime.artifact.folder import replace_file
from bonnx.runtime.report import page, read_run, show

from ..errors import InputError
from . import print_json

__all__ = ["configure", "run"]

_IN_TERMINAL = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="folder with searches.jsonl, figures.json, or both")
    parser.add_argument("-o", "--output", help="write a page here; without it the first searches are printed")
    parser.add_argument("--title", default="What the search did", help="title of the page")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def run(arguments: argparse.Namespace) -> int:
    """Write the page, or print."""
    if arguments.output is None:
        if arguments.json:
            raise InputError("--json says what was written; pass -o")
        report = read_run(Path(arguments.run), _IN_TERMINAL)
        console = Console(highlight=False)
        for search in report.searches:
            show(console, search)
            console.print()
        if report.left_out or report.figures:
            console.print(f"{report.left_out} more searches, {len(report.figures)} figures: pass -o report.html")
        return 0
    output = Path(arguments.output)
    if output.exists() and not arguments.overwrite:
        raise InputError(f"{output} exists; choose another file, or pass --overwrite")
    report = read_run(Path(arguments.run))
    try:
        replace_file(output, page(report, arguments.title).encode())
    except OSError as e:
        raise InputError(f"cannot write {output}: {e.strerror or e}") from e
    if arguments.json:
        counts = {"figures": len(report.figures), "searches": len(report.searches)}
        print_json({"ok": True, "output": str(output), **counts})
    else:
        print(f"{output}: figures: {len(report.figures)}, searches: {len(report.searches)}")
    return 0

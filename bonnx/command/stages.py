"""The stages of long work on stderr: a line for each when it ends, and on a terminal the running one."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["shown_stages"]


@contextlib.contextmanager
def shown_stages() -> Iterator[Callable[[str], None]]:
    """Yield a function that is told the name of each stage when it begins.

    A stage that ends gets a line with its seconds. One that fails has none: the error follows.
    """
    console = Console(stderr=True, highlight=False)
    live = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    )
    running: list[tuple[str, float]] = []

    def end() -> None:
        for name, start in running:
            line = f"{time.perf_counter() - start:7.1f} s  {name}"
            live.console.print(line, markup=False, soft_wrap=True) if console.is_terminal else _say(line)
        running.clear()
        for task in live.task_ids:
            live.remove_task(task)

    def begin(name: str) -> None:
        end()
        running.append((name, time.perf_counter()))
        if console.is_terminal:
            live.add_task(name, total=None)

    with live if console.is_terminal else contextlib.nullcontext():
        yield begin
        end()


def _say(line: str) -> None:
    # Without a stderr, `print` would use stdout, which is for data.
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)

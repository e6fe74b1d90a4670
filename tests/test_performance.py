"""The performance page shows what the record holds."""

import re
from html import unescape

import pytest

from benchmarks.performance import PAGE, PLOT, drawn, panels
from benchmarks.performance_plot import described
from benchmarks.record import read_runs, record


@pytest.fixture
def run(tmp_path, rng):
    """Write random figures of two ways at three sizes; return them by way and size, the run's time, and all runs."""
    path = tmp_path / "measurements.jsonl"
    sizes = sorted(map(int, rng.choice(100, 3, replace=False)))
    seconds = {(way, n): float(rng.uniform(0.01, 90)) for way in ("ours", "theirs") for n in sizes}
    figures = [{"way": way, "n": n, "prompt": 512, "seconds": value} for (way, n), value in seconds.items()]
    others = [{**figure, "prompt": 2048, "seconds": 1000.0} for figure in figures]
    record("rank", [*figures[:-1], *others], rates={"memory": 20.4}, path=path)
    runs = read_runs(path)
    ((_, time),) = runs
    return seconds, time, runs


def test_the_page_is_what_the_record_gives():
    page = PAGE.read_text(encoding="utf-8")
    assert drawn(page, read_runs()) == page, "run `python -m benchmarks.performance`"


def test_the_plot_is_what_the_record_gives():
    shown = re.search("<dc:description>(.*?)</dc:description>", PLOT.read_text(encoding="utf-8"), re.DOTALL)
    expected = described(panels(PAGE.read_text(encoding="utf-8"), read_runs()))
    assert unescape(shown[1]) == expected, "run `python -m benchmarks.performance`"


def test_a_table_holds_the_chosen_figures(run):
    seconds, time, runs = run
    text = f"Before.\n\n<!-- table: rank {time} by n, prompt=512 -->\nold\n<!-- end of table -->\n\nAfter.\n"
    page = drawn(text, runs)
    assert page.startswith("Before.\n\n<!-- table: rank")
    assert page.endswith("<!-- end of table -->\n\nAfter.\n")
    assert "old" not in page
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    columns = [int(name.removeprefix("N = ")) for name in table[0][1:]]
    cells = {(row[0], n): cell for row in table[2:] for n, cell in zip(columns, row[1:], strict=True)}
    *measured, missing = seconds
    assert {key: float(cells.pop(key)) for key in measured} == {
        key: pytest.approx(seconds[key], abs=1e-3, rel=1e-4) for key in measured
    }
    assert cells == {missing: "-"}
    # Wherever the line is broken, which depends on the machine.
    assert "memory 20 GB/s" in " ".join(page.split())
    assert drawn(page, runs) == page


@pytest.mark.parametrize(
    ("comment", "error"),
    [
        ("rank 2000-01-01T00:00:00Z by n, prompt=512", "has no run"),
        ("rank {time} by n", "11 figures for 6 cells"),
        ("rank {time} by n, prompt=7", "0 figures"),
        ("rank {time} by layers", "0 figures"),
    ],
)
def test_a_table_that_the_record_cannot_fill_is_an_error(run, comment, error):
    _, time, runs = run
    text = f"<!-- table: {comment.format(time=time)} -->\n<!-- end of table -->\n"
    with pytest.raises(SystemExit, match=error):
        drawn(text, runs)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table: rank -->\n<!-- end of table -->\n",
        "<!-- table: rank {time} by n, prompt=512 -->\n",
        "<!-- table: rank {time} by n, prompt=512 -->\n" * 2 + "<!-- end of table -->\n",
    ],
)
def test_comments_that_make_no_table_are_an_error(run, text):
    _, time, runs = run
    with pytest.raises(SystemExit, match="is not as"):
        drawn(text.format(time=time), runs)

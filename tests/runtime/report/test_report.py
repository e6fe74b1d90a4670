"""`bonnx report`: what a run holds is on the page, as text, and what is wrong with a run is named."""

import builtins
import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bonnx import InputError
from bonnx.runtime.report import page, read_run, show
from bonnx.runtime.report.page import MARKS, one_line

VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use"}


class Parser(HTMLParser):
    """Tags in balance, the text of the page, and how often a class stands."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.classes, self.scripts = [], "", [], 0

    def handle_starttag(self, tag, attrs):
        self.classes += (dict(attrs).get("class") or "").split()
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data


def parsed(text):
    parser = Parser()
    parser.feed(text)
    parser.close()
    assert not parser.open
    return parser


PIECES = [
    "12",
    "-",
    "3=",
    ";",
    "\n",
    "<script>alert(1)</script>",
    "&amp;",
    "é漢",
    ' "',
    "</span>",
    "\u202e",
    "\x1b[31m",
]


def made_search(rng, tree=True):
    """A search at random, as `SearchResult.to_record` gives one."""

    def row(least=1):
        size = int(rng.integers(least, 6))
        scores = [None if rng.uniform() < 0.1 else float(rng.uniform()) for _ in range(size)]
        return {"pieces": [PIECES[i] for i in rng.integers(0, len(PIECES), size)], "scores": scores}

    nodes = []
    for i in range(int(rng.integers(1, 12))):
        parent = int(rng.integers(i)) if tree and i and rng.uniform() < 0.7 else None
        fate = list(MARKS)[rng.integers(len(MARKS))]
        look = "ahead<b>" if rng.uniform() < 0.2 else None
        nodes.append(
            {**row(), "parent": parent, "tokens": [], "score": float(rng.uniform()), "round": 0, "fate": fate}
            | {"lookahead": look}
        )
    candidates = []
    for _ in range(int(rng.integers(1, 9))):
        found = {**row(), "tokens": [], "score": None if rng.uniform() < 0.2 else float(rng.uniform())}
        found |= {"text": "x", "finish_reason": "stop", "answer": "<i>7</i>", "group_score": 0.5}
        candidates.append({**found, "node": int(rng.integers(-1, len(nodes)))})
    cost = {"prompt_tokens": 9, "sampled_tokens": 100, "computed_tokens": 110, "scored_tokens": 110, "seconds": 0.5}
    return {
        "prompt": ["3,7>1:<script>", [{"role": "user", "content": "why & how"}], [1, 2]][rng.integers(3)],
        "method": "beam", "options": {"width": 4}, "best_index": int(rng.integers(len(candidates))),
        "vote": "weighted", "candidates": candidates, "nodes": nodes, "cost": cost, "policy": None,
    }  # fmt: skip


def figure(scale):
    xs = ["easy", "hard"] if scale == "category" else [4, 16, 64]
    points = [{"x": x, "y": 50.0 + i, "low": 45.0, "high": 60.0} for i, x in enumerate(xs)]
    series = [{"name": f"way & {n}", "points": points} for n in range(3)]
    return {"id": f"f-{scale}", "title": f"About <{scale}>", "caption": "What is seen.", "x_label": "budget",
            "y_label": "solved, %", "x_scale": scale, "series": series}  # fmt: skip


def write(folder, searches=(), figures=()):
    folder.mkdir(exist_ok=True)
    (folder / "searches.jsonl").write_text("".join(json.dumps(s) + "\n" for s in searches), encoding="utf-8")
    if figures:
        (folder / "figures.json").write_text(json.dumps(list(figures)))
    return folder


@pytest.mark.parametrize("repeat", range(10))
def test_everything_is_on_the_page_as_text(rng, tmp_path, repeat):
    searches = [made_search(rng, tree=bool(rng.integers(2))) for _ in range(3)]
    html = parsed(page(read_run(write(tmp_path / "run", searches))))
    assert html.scripts == 1
    assert html.text.count("winner") >= len(searches)
    assert html.classes.count("best") == len(searches)
    for search in searches:
        for candidate in search["candidates"]:
            assert one_line("".join(candidate["pieces"])) in html.text
        if any(node["parent"] is not None for node in search["nodes"]):
            for node in search["nodes"]:
                assert one_line("".join(node["pieces"])) in html.text
    trees = [s for s in searches if any(node["parent"] is not None for node in s["nodes"])]
    for fate in MARKS:
        assert html.classes.count(fate) == sum(node["fate"] == fate for s in trees for node in s["nodes"])


def test_figures_are_pictures_with_text(tmp_path):
    drawn = page(read_run(write(tmp_path / "run", figures=[figure(s) for s in ("log2", "linear", "category")])))
    html = parsed(drawn)
    assert drawn.count("<svg") == 3
    for text in ("About <log2>", "What is seen.", "way & 2", "hard", "solved, %"):
        assert text in html.text
    assert "http://" not in drawn.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_without_matplotlib_figures_say_what_to_install(tmp_path, monkeypatch, rng):
    plain = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install bonnx\[report\]"):
        page(read_run(write(tmp_path / "a", figures=[figure("log2")])))
    assert page(read_run(write(tmp_path / "b", [made_search(rng)])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(best_index=99), "best_index: expected an index"),
        (lambda s: s.pop("vote"), "vote"),
        (lambda s: s["nodes"][0].update(parent=0), r"nodes\[0\].parent: expected an earlier node"),
        (lambda s: s["nodes"][0].update(fate="lost"), "fate"),
        (lambda s: s["candidates"][0].update(node=77), r"candidates\[0\].node: expected"),
        (lambda s: s["candidates"][0]["pieces"].append("x"), r"candidates\[0\]: \d+ pieces, but"),
    ],
)
def test_a_wrong_line_is_named(rng, tmp_path, change, message):
    good, bad = made_search(rng), made_search(rng)
    change(bad)
    with pytest.raises(InputError, match=f"line 2.*{message}"):
        read_run(write(tmp_path / "run", [good, bad]))


def test_torn_lines_and_empty_folders(tmp_path):
    folder = write(tmp_path / "run")
    (folder / "searches.jsonl").write_text('{"prompt": "x", NaN')
    with pytest.raises(InputError, match="line 1"):
        read_run(folder)
    with pytest.raises(InputError, match=r"expected figures\.json or searches\.jsonl"):
        read_run(tmp_path)
    (tmp_path / "figures.json").write_text('[{"id": 1}]')
    with pytest.raises(InputError, match=r"figures\.json"):
        read_run(tmp_path)


def test_the_terminal_shows_the_same(rng, tmp_path):
    search = read_run(write(tmp_path / "run", [made_search(rng)])).searches[0]
    console = Console(record=True, width=200, file=io.StringIO())
    show(console, search)
    text = console.export_text()
    for candidate in search.candidates:
        assert one_line("".join(candidate.pieces)).strip() in text
    assert "sampled tokens 100" in text


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bonnx", "report", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_writes_all_or_nothing(rng, tmp_path):
    run = write(tmp_path / "run", [made_search(rng) for _ in range(53)])
    out = tmp_path / "report.html"
    done = command(run, "-o", out, "--json")
    assert json.loads(done.stdout) == {"ok": True, "output": str(out), "figures": 0, "searches": 50}
    assert "3 more searches" in out.read_text(encoding="utf-8")
    again = command(run, "-o", out)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    (run / "searches.jsonl").write_text("{}")
    before = out.read_bytes()
    wrong = command(run, "-o", out, "--overwrite")
    assert wrong.returncode == 2
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert command(write(tmp_path / "two", [made_search(rng)])).returncode == 0
    assert command(tmp_path / "none").returncode == 2
    assert Path(out).stat().st_mode & 0o044


def test_scores_are_coloured_by_their_place_in_the_range(rng, tmp_path):
    search = made_search(rng)
    search["candidates"][0] |= {"pieces": ["a", "b"], "scores": [-3.0, 5.0]}
    text = page(read_run(write(tmp_path / "run", [search])))
    assert "#f4b183" in text
    assert "#7fb2d9" in text
    assert np.isfinite(read_run(tmp_path / "run").searches[0].range()).all()

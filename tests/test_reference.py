"""Lists of names in help, docstrings and guides are those that the program has; the reference has every public name."""

import dataclasses
import importlib.util
import inspect
from pathlib import Path

import pytest

from bonnx.command import main
from bonnx.runtime.artifact.manifest import AGGREGATIONS, PRECISIONS, VOTES
from bonnx.runtime.generate.result import FINISH_REASONS
from bonnx.runtime.model import Model
from bonnx.runtime.search import METHODS

ROOT = Path(__file__).parents[1]


def guide(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def names_missing_from(text, names):
    """The names that a text does not give in backticks."""
    return [name for name in names if f"`{name}`" not in text]


def test_the_docstring_of_search_names_every_method():
    assert names_missing_from(inspect.getdoc(Model.search), METHODS) == []


@pytest.mark.parametrize("method", METHODS)
def test_the_guide_to_search_has_a_row_for_every_method_and_its_settings(method):
    (row,) = (line for line in guide("search").splitlines() if line.startswith(f"| `{method}` |"))
    shared = "those of `beam`" in row and {field.name for field in dataclasses.fields(METHODS["beam"][0])}
    settings = [field.name for field in dataclasses.fields(METHODS[method][0])]
    assert names_missing_from(row, [name for name in settings if not (shared and name in shared)]) == []


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("python", AGGREGATIONS),
        ("python", FINISH_REASONS),
        ("reward_models", AGGREGATIONS),
        ("checkpoint", AGGREGATIONS),
        ("search", VOTES),
        ("precision", PRECISIONS),
    ],
)
def test_guides_have_every_name(page, names):
    text = guide(page)
    assert [name for name in names if f"`{name}`" not in text and f'"{name}"' not in text] == []


@pytest.mark.parametrize(
    ("command", "names"),
    [("rank", AGGREGATIONS), ("batch", AGGREGATIONS), ("export", AGGREGATIONS), ("generate", METHODS)],
)
def test_help_has_every_name(command, names, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert [name for name in names if name not in words] == []


def test_the_reference_has_every_public_name():
    """`nox -s docs` also refuses a page without one of its names; this says so where the tests run."""
    pytest.importorskip("mkdocs", reason="of the extra docs")
    site = importlib.util.spec_from_file_location("build_site", ROOT / "docs/build_site.py")
    build_site = importlib.util.module_from_spec(site)
    site.loader.exec_module(build_site)
    for package in build_site.REFERENCE:
        paths = [line.rpartition(".")[2] for line in build_site._reference(package, "").splitlines() if ":::" in line]
        assert sorted(paths) == sorted(importlib.import_module(package).__all__)

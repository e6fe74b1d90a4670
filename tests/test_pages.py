"""What the documentation shows is true: every code block runs, and the names and files that it mentions exist.

A block that cannot run here has `<!-- skip: reason -->` on the line above it.
"""

import importlib.metadata
import pkgutil
import re

import numpy as np
import pytest

from bonnx.command import main
from tests.checkpoints import make
from tests.pages import PAGES, ROOT, PageReader, read_blocks


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def run_blocks(page, text):
    with PageReader(page) as reader:
        for block in read_blocks(text):
            reader.run(block)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A folder in which `python export.py --checkpoint DIR -o OUT` has run, on a model that scores steps."""
    folder = tmp_path_factory.mktemp("reward")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make(folder / "DIR", "Qwen2", "steps", np.random.default_rng(0))
        assert main(["export", "--checkpoint", "DIR", "-o", "OUT"]) == 0
    return folder


@pytest.fixture
def folder(countdown, tmp_path, monkeypatch):
    """A reader's folder: the artifact that `python export.py` writes, and the documentation."""
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/countdown").symlink_to(countdown, target_is_directory=True)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, folder, request):
    text = read(page)
    if "--checkpoint DIR -o OUT" in text:
        (folder / "OUT").symlink_to(request.getfixturevalue("reward_model") / "OUT")
    run_blocks(page, text)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<!-- skip: -->\n```python\n```\n", "line 3: `<!-- skip: reason -->` needs a reason"),
        ("<!-- skip: slow -->\n\n```python\n```\n", "a skip stands directly above its block"),
        ("- A list:\n\n    ```python\n    ```\n", "a fence is indented, nested or not closed"),
        ("```python\nprint(2 + 2)  # 5\n```\n", "expected '5', got '4'"),
        ("```bash\nfalse | true\n```\n", "line 2: exit code 1"),
        ("```ruby\n```\n", "line 2: tests/pages.py cannot run blocks of 'ruby'"),
    ],
)
def test_a_page_that_is_wrong_is_an_error(text, error):
    with pytest.raises(AssertionError, match=re.escape(error)):
        run_blocks("page", text)


@pytest.mark.parametrize("page", PAGES)
def test_the_reasons_of_skipped_blocks_name_tests_that_exist(page):
    reasons = [block.reason for block in read_blocks(read(page)) if block.reason]
    named = [path for reason in reasons for path in re.findall(r"(?:tests|\.ci)/[\w/.]*\w", reason)]
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_and_folders_in_backticks_exist(page):
    folders = "benchmarks|bonnx|docs|export|js|models|runtime|tests|tools"
    named = re.findall(rf"`((?:{folders})/[a-z_\d/.]*)`", read(page))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_dotted_names_in_backticks_exist(page):
    def exists(name):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            return False
        return True

    assert [name for name in re.findall(r"`(bonnx(?:\.\w+)+)`", read(page)) if not exists(name)] == []


@pytest.mark.parametrize("page", PAGES)
def test_extras_that_pages_install_exist(page):
    extras = importlib.metadata.metadata("bonnx").get_all("Provides-Extra")
    named = {name for names in re.findall(r"pip install [^`\n]*\[([\w,]+)\]", read(page)) for name in names.split(",")}
    # Other packages have extras, too.
    assert named - {"cuda", "cudnn", "grpc"} <= set(extras)


def test_the_architecture_shows_every_folder():
    tree = read_blocks(read("docs/architecture.md"))[0].code
    shown, above = set(), []
    for indent, name in re.findall(r"(?m)^( *)([a-z_]+)/ ", tree):
        above = [*above[: len(indent) // 2], name]
        shown.add("/".join(above))
    packages = ("bonnx", "runtime", "export", "models")
    folders = {path.parent.relative_to(ROOT).as_posix() for name in packages for path in ROOT.glob(f"{name}/**/*.py")}
    assert shown == folders | {"js", "tests", "benchmarks", "docs"}

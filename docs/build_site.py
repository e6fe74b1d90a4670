"""What MkDocs reads beside mkdocs.yml: the pages of the site stand where their files stand in the repository.

So a link between README.md, docs/ and CHANGELOG.md is the same on the site as where the code is shown.
"""

import importlib
import re
from pathlib import Path
from types import ModuleType

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
STYLE = "docs/site.css"
# The public names of these packages are the reference.
REFERENCE = {
    "bonnx": "Load a model, rank, score, generate, search.",
    "bonnx.runtime.search": "What `Model.search` runs and returns, and policies that choose a method.",
    "bonnx.models": "Networks in PyTorch, their configurations and checkpoints.",
    "bonnx.models.hub": "Checkpoints by hub id.",
    "bonnx.export.artifact": "From a network to an artifact.",
    "bonnx.runtime.batch": "Files ranked row by row.",
    "bonnx.runtime.batch.ray_ranker": "For datasets of Ray Data.",
    "bonnx.runtime.serve": "A model behind HTTP.",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace what MkDocs found in docs/ by the pages, all that they link to, and the reference."""
    for file in list(files.documentation_pages()) + list(files.media_files()):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    linked = _with_links(["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *sorted(_below("docs/*.md"))])
    reference = {f"reference/{package}.md": _reference(package, about) for package, about in REFERENCE.items()}
    for name in linked:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for name, content in reference.items():
        files.append(File.generated(config, name, content=content))
    files.append(File.generated(config, STYLE, abs_src_path=str(ROOT / STYLE)))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Refuse a page of the reference that lacks a public name."""
    package = page.file.src_uri.removeprefix("reference/").removesuffix(".md")
    if package in REFERENCE:
        missing = [name for name in importlib.import_module(package).__all__ if f">{name}</" not in html]
        if missing:
            raise PluginError(f"the reference of {package} lacks {', '.join(missing)}")


def _below(pattern: str) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)]


def _with_links(pages: list[str]) -> list[str]:
    """The pages and every file of the repository that they link to, in the order of the links."""
    names: dict[str, None] = {}
    waiting = list(pages)
    while waiting:
        name = waiting.pop(0)
        if name in names:
            continue
        names[name] = None
        if name.endswith(".md"):
            text = re.sub(
                r"^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
            )
            targets = [(ROOT / name).parent / target for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)]
            found = [target.resolve().relative_to(ROOT).as_posix() for target in targets if target.is_file()]
            waiting = found + waiting
    return list(names)


def _reference(package: str, about: str) -> str:
    """A page of the public names of a package: for each an instruction to mkdocstrings to show its docstring."""
    module = importlib.import_module(package)
    names = sorted(module.__all__, key=lambda name: _kind(getattr(module, name)))
    return "\n".join([f"# {package}\n\n{about}\n", *(f"::: {_path(module, name)}\n" for name in names)])


def _path(module: ModuleType, name: str) -> str:
    """Where mkdocstrings finds a name: where it is defined, or for a constant where it is imported by name."""
    value = getattr(module, name)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    # bonnx takes its names from bonnx.runtime as they are asked for.
    package = "bonnx.runtime" if module.__name__ == "bonnx" else module.__name__
    return f"{package}.{name}"


def _kind(value: object) -> int:
    """Where a name stands in the reference: functions first, then classes, errors and constants."""
    if isinstance(value, type):
        return 2 if issubclass(value, Exception) else 1
    return 0 if callable(value) else 3

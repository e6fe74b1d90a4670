"""What pyproject.toml cannot say: the README for the package index, with links that need no checkout."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
SOURCE = re.search(r'^Source = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


def absolute(match: re.Match[str]) -> str:
    """A link of Markdown, `](docs/search.md)`, from the root of the repository to its public address."""
    target = match[1]
    view = "raw" if target.endswith((".png", ".svg")) else "blob"
    return f"]({SOURCE}/{view}/main/{target})"


# Neither an address, https://..., nor a place in the page itself, #...
readme = re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", absolute, (ROOT / "README.md").read_text(encoding="utf-8"))
setup(long_description=readme, long_description_content_type="text/markdown")

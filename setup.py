"""The README for the package index, where links to files of the repository lead nowhere. The rest: pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# The address of the repository, once pyproject.toml has one.
SOURCE = re.search(r'^Source = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


def outward(match: re.Match[str]) -> str:
    """A link of Markdown to a file, with the file's public address; without one its text alone, and no picture."""
    picture, text, target = match.groups()
    if SOURCE is None:
        return "" if picture else text
    view = "raw" if picture else "blob"
    return f"{picture}[{text}]({SOURCE[1]}/{view}/main/{target})"


readme = (ROOT / "README.md").read_text(encoding="utf-8")
# Neither an address, https://..., nor a place in the page itself, #...
link = r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)"
if SOURCE is None:
    # What is in parentheses only to be followed says nothing as text.
    readme = re.sub(rf"\s\({link}\)", "", readme)
readme = re.sub(link, outward, readme)
setup(long_description=readme, long_description_content_type="text/markdown")

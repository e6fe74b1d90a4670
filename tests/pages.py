"""The code blocks of the documentation, run as a reader would run them: in order, in one folder."""

import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.runtime.serve.servers import Process

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
_BLOCK = re.compile(r"^(?:<!-- skip:(?P<reason>.*?)-->\n)?```(?P<language>.*)\n(?P<code>(?:.*\n)*?)```$", re.MULTILINE)
# What a reader has done already, and what this machine answers for: errors of HTTP end a block, as other errors do.
_PRELUDE = """set -euo pipefail
pip() { :; }
curl() { command curl --silent --show-error --fail-with-body --max-time 60 "$@"; }
"""


@dataclass(frozen=True)
class CodeBlock:
    """A code block of a page.

    Attributes:
        language: the word after the fence.
        line: the number of the block's first line in the page, from 1.
        reason: why it cannot run in the tests; None for one that runs.
    """

    language: str
    code: str
    line: int
    reason: str | None


def read_blocks(text: str) -> list[CodeBlock]:
    """The blocks of a page; a fence that this does not understand is an error, so that none is left out."""
    blocks = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        reason = match["reason"]
        assert reason is None or reason.strip(), f"line {line}: `<!-- skip: reason -->` needs a reason"
        blocks.append(CodeBlock(match["language"], match["code"], line, reason and reason.strip()))
    fences, skips = text.count("```"), len(re.findall("^<!-- skip:", text, re.MULTILINE))
    assert fences == 2 * len(blocks), "a fence is indented, nested or not closed"
    assert skips == sum(block.reason is not None for block in blocks), "a skip stands directly above its block"
    return blocks


class PageReader:
    """Runs the blocks of one page in the current folder; Python blocks share their names, as in one program."""

    def __init__(self, page: str) -> None:
        self.page = page
        self._names = {"__name__": "__main__", "print": self._print}
        self._expected: dict[int, str] = {}
        self._url = "localhost:8000"
        self._open = ExitStack()
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self._environment = {**os.environ, "PATH": programs}

    def __enter__(self) -> "PageReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def run(self, block: CodeBlock) -> None:
        """Run a block, or check what can be checked of one that is skipped."""
        run = getattr(self, f"_{block.language}", None)
        assert run is not None, f"line {block.line}: tests/pages.py cannot run blocks of {block.language!r}"
        if block.reason is None:
            run(block)
        elif block.language == "python":
            compile(block.code, self.page, "exec")
        elif block.language == "bash":
            self._shell(block.code, block, "-n")

    def _text(self, block: CodeBlock) -> None:
        """Is read, not run."""

    def _json(self, block: CodeBlock) -> None:
        json.loads(block.code)

    def _python(self, block: CodeBlock) -> None:
        lines = enumerate(block.code.splitlines(), block.line)
        self._expected = {n: line.partition("  # ")[2] for n, line in lines if re.match(r"print\(.*\)  # ", line)}
        # Errors show the line of the page.
        exec(compile("\n" * (block.line - 1) + block.code, self.page, "exec"), self._names)
        assert not self._expected, f"not printed: {self._expected}"

    def _print(self, *values: object) -> None:
        """What a program prints is what the comment beside the `print` says; `...` stands for any text."""
        wanted = self._expected.pop(sys._getframe(1).f_lineno, None)
        if wanted is not None:
            printed = " ".join(map(str, values))
            same = doctest.OutputChecker().check_output(wanted + "\n", printed + "\n", doctest.ELLIPSIS)
            assert same, f"expected {wanted!r}, got {printed!r}"

    def _bash(self, block: CodeBlock) -> None:
        commands, serves, options = block.code.partition("bonnx serve ")
        # A server that the block starts stays until the page ends; later blocks find it where it listens.
        self._shell(commands.replace("localhost:8000", self._url), block)
        if serves:
            process = self._open.enter_context(Process(*options.split(), env=self._environment))
            self._url = process.url.removeprefix("http://")

    def _javascript(self, block: CodeBlock) -> None:
        raise NotImplementedError("a block of JavaScript needs packages: run it in tests/js/test_module.py")

    def _cpp(self, block: CodeBlock) -> None:
        raise NotImplementedError("a program of C++ needs a compiler: run it in tests/export/test_programs.py")

    def _html(self, block: CodeBlock) -> None:
        raise NotImplementedError("a page needs a browser")

    def _shell(self, code: str, block: CodeBlock, *options: str) -> None:
        command = [shutil.which("bash"), *options, "-c", _PRELUDE + code]
        done = subprocess.run(
            command, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"line {block.line}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"

"""One command for each chore: `nox -s tests`, `lint`, `types`, `imports`.

The sessions run in the environment that nox itself runs in, as `pip install -e ".[cpu,export,test]" nox` makes it: one
environment with PyTorch is large enough. What follows `--` goes to the tool: `nox -s tests -- tests/models -k rope`.
"""

import os
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "imports", "tests"]

# Where nox was started from may not be on PATH.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@nox.session
def tests(session: nox.Session) -> None:
    """Run the test suite in two processes; slow tests by `-- --slow`."""
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check rules and format; `-- --fix` mends what can be."""
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types, strictly."""
    session.run("mypy", *session.posargs)


@nox.session
def imports(session: nox.Session) -> None:
    """Check who imports whom: the contracts in pyproject.toml."""
    with session.chdir("tools/typecheck"):
        session.run("lint-imports", "--no-logo", "--no-cache", *session.posargs, "../../pyproject.toml")

"""One command for each chore: `nox -s tests`, `lint`, `types`, `imports`, `docs`, `package`.

The sessions run in the environment that nox itself runs in, as `pip install -e ".[cpu,export,dev]"` makes it: one
environment with PyTorch is large enough. What follows `--` goes to the tool: `nox -s tests -- tests/models -k rope`.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "imports", "docs", "package", "tests"]

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


@nox.session
def package(session: nox.Session) -> None:
    """Build the source distribution, the wheel from it, and try both."""
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)
    session.run("python", "-m", "build", "--quiet", "--outdir", str(folder), ".")
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    missing = [name for name in tracked if name not in packed and not name.startswith("tools/")]
    if missing:
        session.error(f"MANIFEST.in leaves these out of the source distribution: {', '.join(missing)}")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    relative = re.findall(r"\]\((?!https?:|#)[^)]*\)", metadata)
    if relative:
        session.error(f"these links do not work on the package index: {', '.join(relative)}")
    # Away from the source, with Python alone: the dependencies are needed only by what uses them.
    venv = folder / "venv"
    session.run("python", "-m", "venv", str(venv))
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    session.run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel), external=True)
    with session.chdir(folder):
        session.run(str(python), "-m", "bonnx", "--version", external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; any warning is an error. `-- serve` shows it while you write."""
    if session.posargs:
        session.run("mkdocs", *session.posargs)
    else:
        session.run("mkdocs", "build", "--quiet", "--clean")

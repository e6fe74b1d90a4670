"""Packages of npm for tests that run Node: skipped where there is no Node, or where the registry is out of reach."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.pages import ROOT

# How npm says that it got no answer. Any other error, such as a version that is gone, is a failure.
UNREACHABLE = {"EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "ENETUNREACH", "ENOTCACHED", "ENOTFOUND"}
UNREACHABLE |= {"ECONNECTIONTIMEOUT", "EIDLETIMEOUT", "ERESPONSETIMEOUT", "ETIMEDOUT", "ETRANSFERTIMEOUT"}
# The versions are those of docs/graphs.md.
PAGE = ROOT / "docs/graphs.md"
PACKAGES = re.search(r"`npm install ([^`]+)`", PAGE.read_text(encoding="utf-8"))[1].split()


def install(folder: Path, packages: list[str]) -> None:
    """Install packages in a folder, for scripts that lie in it: from the registry, or from npm's own cache.

    Skips the test if that is not possible here.
    """
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    # Without a package.json npm would look for one in the folders above.
    (folder / "package.json").write_text("{}")
    options = ["--json", "--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", "--fetch-retries=1"]
    command = [shutil.which("npm"), "install", *options, "--fetch-retry-mintimeout=1000", *packages]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        code = re.search(r'"code": "(\w+)"', done.stdout)
        if code and code[1] in UNREACHABLE:
            pytest.skip(f"the npm registry is not reachable: {code[1]}")
        pytest.fail(done.stdout + done.stderr)

"""Packages of Debian for tests that compile: unpacked in a folder of the test, nothing is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def unpack(folder: Path, release: str, packages: list[str]) -> None:
    """Unpack packages of a release of Debian below a folder, from the mirror that this machine uses.

    Skips the test where there is no apt, or the mirror is out of reach.
    """
    if shutil.which("apt-get") is None or not KEYS.exists():
        pytest.skip(f"{' and '.join(packages)} are not installed, and this is no Debian, whose packages have them")
    listed = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian", "Component: main"]
    mirrors = subprocess.run(listed, capture_output=True, text=True, timeout=60).stdout.split()
    if not mirrors:
        pytest.skip("apt has no list of Debian's packages; run `apt-get update`")
    apt = folder / "apt"
    (apt / "lists/partial").mkdir(parents=True)
    (apt / "archives/partial").mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb [signed-by={KEYS}] {mirrors[0]} {release} main\n")
    settings = {
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "-",
        "Dir::State": apt,
        "Dir::State::Status": apt / "status",
        "Dir::Cache": apt,
        "APT::Sandbox::User": "root",
        "Acquire::Retries": 2,
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    for command in (["update", "--error-on=any"], ["download", *packages]):
        done = subprocess.run(["apt-get", *options, *command], cwd=apt, capture_output=True, text=True, timeout=300)
        if done.returncode:
            assert "resolv" in done.stderr or "onnect" in done.stderr or "Failed to fetch" in done.stderr, done.stderr
            pytest.skip(f"Debian's mirror is not reachable: {done.stderr.strip().splitlines()[-1]}")
    for package in apt.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, folder], check=True, timeout=60)

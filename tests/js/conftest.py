"""A folder in which Node finds the npm package `bonnx` and what it needs."""

import json
import shutil

import pytest

from tests.npm import PACKAGES, install
from tests.pages import ROOT

TYPESCRIPT = "typescript@5.9.3"


@pytest.fixture(scope="package")
def npm_folder(tmp_path_factory):
    """The package lies in `js`, as it is published, with its tests; scripts in this folder import it as `bonnx`."""
    folder = tmp_path_factory.mktemp("npm")
    package = json.loads((ROOT / "js/package.json").read_text(encoding="utf-8"))
    needed = [f"{name}@{version}" for name, version in package["dependencies"].items()]
    runtime = [name for name in PACKAGES if name.startswith("onnxruntime-web@")]
    install(folder, [*needed, *runtime, TYPESCRIPT])
    shutil.copytree(ROOT / "js", folder / "js", ignore=shutil.ignore_patterns("node_modules"))
    (folder / "node_modules/bonnx").symlink_to("../js", target_is_directory=True)
    yield folder
    # 150 MB, and pytest keeps the folders of its last runs.
    shutil.rmtree(folder / "node_modules")

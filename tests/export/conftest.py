"""A folder in which Node finds ONNX Runtime and the tokenizer."""

import shutil

import pytest

from tests.npm import PACKAGES, install


@pytest.fixture(scope="module")
def npm_folder(tmp_path_factory):
    """Where Node finds the packages of the page, for a script that lies in it."""
    folder = tmp_path_factory.mktemp("npm")
    install(folder, PACKAGES)
    yield folder
    # 150 MB, and pytest keeps the folders of its last runs.
    shutil.rmtree(folder / "node_modules")

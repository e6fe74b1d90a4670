"""The models that most tests of generation use."""

import pytest

import bonnx


@pytest.fixture(scope="module")
def puzzler(countdown):
    return bonnx.load(countdown)


@pytest.fixture(scope="module")
def babbler(tiny):
    return bonnx.load(tiny)

import pytest

from tests.runtime.search.tabular import Table


@pytest.fixture
def table(rng):
    return Table(int(rng.integers(2**31)))

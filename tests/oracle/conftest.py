import pytest

from tests.support.oracle import OraclePool


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    return OraclePool(tmp_path_factory.mktemp("oracle"))

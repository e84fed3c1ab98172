import pytest

from qwen3vl_disagg.media.child import ChildProcess
from tests.support.media_children import counted


@pytest.fixture
def started(monkeypatch) -> list[ChildProcess]:
    """The children started in a test, as they come."""
    return counted(monkeypatch)

"""Setup of every test run: the repository root on sys.path (for `tests.support`), one thread, hypothesis profiles."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent.parent))

torch.set_num_threads(1)

_SLOW_MACHINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", max_examples=30, deadline=None, suppress_health_check=_SLOW_MACHINE)
settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True, suppress_health_check=_SLOW_MACHINE)
settings.register_profile(
    "nightly", max_examples=2000, stateful_step_count=100, deadline=None, suppress_health_check=_SLOW_MACHINE
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

from qwen3vl_disagg.core import logs  # noqa: E402 - the path is set above
from tests.support.torchvision_ops import declare_operators  # noqa: E402 - the path is set above

declare_operators()


# Whoever starts this in the background of a shell has SIGINT ignored, and so would all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """A command that is run in this process begins to log; the next test does not read that."""
    root, ours = logging.getLogger(), logging.getLogger("qwen3vl_disagg")
    before, level = list(root.handlers), ours.level
    yield
    if logs._handler not in before:
        root.removeHandler(logs._handler)
    ours.setLevel(level)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of whole systems first: they take longest, and what is short fills the last gap."""
    items.sort(key=lambda item: "system" not in item.path.parts)


@pytest.fixture(autouse=True)
def _leaves_its_priority() -> Iterator[None]:
    yield
    assert os.sched_getscheduler(0) == os.SCHED_OTHER, "real-time: it would starve whatever is beside it"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for plain `pytest`; one for some files of it, where a start would take longer than it saves, and
    for markers, whose tests measure or are large. No more than two: tests that start ranks keep several cores busy."""
    is_whole = config.args == config.getini("testpaths") and "not acceptance" in config.getoption("markexpr")
    return min(2, os.cpu_count() or 1) if is_whole else 0

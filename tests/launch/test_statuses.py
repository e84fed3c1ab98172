"""What `qwen3vl-disagg serve` knows of how its workers left."""

from __future__ import annotations

import os
import signal

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher import api

from qwen3vl_disagg.launch import command
from qwen3vl_disagg.launch.statuses import collected_statuses, first_failure, tell_status

WORKER = {
    "TORCHELASTIC_RUN_ID": "1",
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
}


def leave(monkeypatch, rank: int, status: int) -> None:
    """As a worker of this process does."""
    with monkeypatch.context() as patched:
        for name, value in (WORKER | {"LOCAL_RANK": str(rank)}).items():
            patched.setenv(name, value)
        patched.setattr(os, "getppid", os.getpid)
        tell_status(status)


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({0: 0, 1: 0}, None),
        ({0: 0, 1: 78}, (1, 78)),
        ({0: 2, 1: 3}, (0, 2)),
        ({1: 0}, (0, 1)),  # it was killed
        ({}, (0, 1)),
    ],
)
def test_the_first_that_did_not_end_with_0(monkeypatch, left, expected):
    with collected_statuses() as folder:
        for rank, status in left.items():
            leave(monkeypatch, rank, status)
        assert first_failure(folder, 2) == expected
    assert not folder.exists()


def test_where_nobody_collects_nothing_is_written(monkeypatch):
    with collected_statuses() as folder:
        pass
    leave(monkeypatch, 0, 1)
    assert not folder.exists()


def test_what_an_earlier_process_of_that_number_left_does_not_count(monkeypatch):
    with collected_statuses() as folder:
        leave(monkeypatch, 0, 0)
        leave(monkeypatch, 1, 0)
        with collected_statuses() as again:
            assert again == folder
            assert first_failure(again, 2) == (0, 1)


@pytest.mark.parametrize(
    ("number", "statuses", "expected"),
    [
        (signal.SIGTERM, (0, 0), 0),
        (signal.SIGINT, (0, 0), 0),
        (signal.SIGTERM, (0, 1), 1),
        (signal.SIGTERM, (78, 0), 78),
        (signal.SIGHUP, (0, 0), 1),
    ],
)
def test_after_a_signal_the_status_is_that_of_the_ranks(monkeypatch, caplog, number, statuses, expected):
    def launch(*_):
        def run(*_):
            for rank, status in enumerate(statuses):
                leave(monkeypatch, rank, status)
            raise SignalException("told to end", number)

        return run

    monkeypatch.setattr(api, "elastic_launch", launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert command._supervise(2, []) == expected
    assert ("did not end cleanly" in caplog.text) == any(statuses)

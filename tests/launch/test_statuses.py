"""What `qwen3vl-disagg serve` knows of how its workers left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher import api

from qwen3vl_disagg.cluster.rendezvous import private_folder
from qwen3vl_disagg.cluster.slots import Slot
from qwen3vl_disagg.launch import command
from qwen3vl_disagg.launch.statuses import collected_statuses, first_failure, tell_running, tell_status
from tests.support.server import free_port

WORKER = {
    "TORCHELASTIC_RUN_ID": "1",
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
}


def leave(monkeypatch, rank: int, status: int | None) -> None:
    """As a worker of this process does; None: killed when it was a slot."""
    with monkeypatch.context() as patched:
        for name, value in (WORKER | {"LOCAL_RANK": str(rank)}).items():
            patched.setenv(name, value)
        patched.setattr(os, "getppid", os.getpid)
        tell_running()
        if status is not None:
            tell_status(status)


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({0: 0, 1: 0}, None),
        ({0: 0, 1: 78}, (1, 78)),
        ({0: 2, 1: 3}, (0, 2)),
        ({0: None, 1: 0}, (0, 1)),
        ({0: 0, 1: None}, (1, 1)),
        ({1: 0}, None),  # it was no slot yet, and had nothing to end
        ({}, None),
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
            assert not list(again.iterdir())


def test_what_killed_processes_left_goes_with_the_next_one():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    left, other = private_folder() / f"statuses-{ended.pid}", private_folder() / "statuses-of-nobody"
    alive = private_folder() / f"statuses-{os.getppid()}"
    ended.wait()
    for folder in (left, other, alive):
        folder.mkdir()
    try:
        (left / "0").write_text("running")
        with collected_statuses():
            assert [folder.exists() for folder in (left, other, alive)] == [False, True, True]
    finally:
        other.rmdir()
        alive.rmdir()


def test_a_slot_says_that_it_runs_when_signals_no_longer_kill_it():
    masks = []
    assert Slot([]).run(lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))) == 0
    assert {signal.SIGTERM, signal.SIGINT} <= masks[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_workers_import_is_a_clean_end(number):
    """The first line of the start is that of a worker which has not imported torch."""
    args = [sys.executable, "-m", "qwen3vl_disagg", "serve", "--world", "2", "--port", str(free_port())]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        first = process.stdout.readline()
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert "loading PyTorch in 2 processes" in first
    assert (process.returncode, rest) == (0, "")
    assert not (private_folder() / f"statuses-{process.pid}").exists()


@pytest.mark.parametrize(
    ("number", "statuses", "expected"),
    [
        (signal.SIGTERM, (0, 0), 0),
        (signal.SIGINT, (0, 0), 0),
        (signal.SIGTERM, (0, 1), 1),
        (signal.SIGTERM, (78, 0), 78),
        (signal.SIGTERM, (0, None), 1),
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
    assert ("did not end cleanly" in caplog.text) == any(status != 0 for status in statuses)

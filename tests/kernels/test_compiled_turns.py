"""Who compiles first, and who waits for it."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
import torch
import torch._inductor.runtime.cache_dir_utils  # not in each of the processes anew

from qwen3vl_disagg.kernels import compiling


def enter(folder: str, what: str, seconds: float, queue) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    with compiling.first_alone(what):
        queue.put(("in", what, time.monotonic()))
        time.sleep(seconds)
        queue.put(("out", what, time.monotonic()))


def run(folder, names, seconds=0.5):
    """Processes that compile these at the same time; how many were in at once at the most."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=enter, args=(str(folder), name, seconds, queue)) for name in names]
    for process in processes:
        process.start()
    events = sorted((queue.get(timeout=30) for _ in range(2 * len(names))), key=lambda event: event[2])
    for process in processes:
        process.join(10)
    together = most = 0
    for kind, _, _ in events:
        together += 1 if kind == "in" else -1
        most = max(most, together)
    return most, events


def test_the_first_alone_and_the_others_together(tmp_path):
    most, events = run(tmp_path / "new", ["a"] * 4)
    assert [kind for kind, _, _ in events[:2]] == ["in", "out"]
    assert most >= 2


def test_alone_only_among_those_of_one_kind(tmp_path):
    assert run(tmp_path, ["a", "b"])[0] == 2


def test_nobody_waits_where_everything_is_there(tmp_path):
    run(tmp_path, ["a"], 0.0)
    most, events = run(tmp_path, ["a", "a"])
    assert most == 2
    assert [kind for kind, _, _ in events[:2]] == ["in", "in"]


def test_a_first_one_that_fails_leaves_it_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(RuntimeError), compiling.first_alone("a"):
        raise RuntimeError
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert run(tmp_path, ["a", "a"])[0] == 1


def test_artifacts_of_another_number_of_threads_are_others(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with compiling.first_alone("a"):
                pass
    finally:
        torch.set_num_threads(before)
    assert len([path for path in tmp_path.iterdir() if path.suffix != ".lock"]) == 2

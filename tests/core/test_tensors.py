import ctypes
import sys
import threading
from mmap import PAGESIZE, mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen3vl_disagg.core.tensors import HUGE_PAGE, TouchedAhead, lazy_zeros, on_huge_pages
from tests.support.memory_maps import asks_for_huge_pages, settled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(3, 5, 7), (0, 4), (4, 0), (1,)])
def test_zeros_of_every_dtype_and_shape(shape, dtype):
    zeros = lazy_zeros(shape, dtype)
    assert zeros.dtype == dtype
    assert zeros.shape == shape
    assert not zeros.any()
    zeros += 1
    assert (zeros == 1).all()


def _private_kib() -> int:
    settled()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def test_memory_is_taken_only_when_written():
    np.ones(2**28, dtype=np.uint8)  # freed: what is had from the heap may be written memory
    before = _private_kib()
    zeros = lazy_zeros((64, 2**20), torch.float32)  # 256 MiB
    assert _private_kib() - before < 32 * 1024
    zeros[:32] = 1
    assert _private_kib() - before > 100 * 1024


@pytest.mark.skipif(asks_for_huge_pages(0) is None, reason="the kernel has no huge pages, or does not tell")
def test_large_room_is_asked_for_on_huge_pages():
    large = torch.empty(4 * HUGE_PAGE, dtype=torch.uint8)
    small = torch.frombuffer(mmap(-1, 4096), dtype=torch.uint8)  # the heap may hold room that was asked for and freed
    assert on_huge_pages(large) is large
    assert on_huge_pages(small) is small
    assert asks_for_huge_pages(large.data_ptr() + HUGE_PAGE)
    assert not asks_for_huge_pages(small.data_ptr())
    large.fill_(7)
    assert (large == 7).all()


def _populates() -> bool:
    with mmap(-1, 4096) as room:
        address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(room)))
        return sys.platform == "linux" and ctypes.CDLL(None).madvise(address, ctypes.c_size_t(4096), 23) == 0


@pytest.mark.skipif(not _populates(), reason="the system does not populate on demand")
def test_memory_ahead_of_the_rows_in_use_is_there_before_it_is_written():
    tensors = [lazy_zeros((4096, 2**15), torch.uint8) for _ in range(2)]  # 128 MiB: never of memory that was freed
    before = _private_kib()
    ahead = TouchedAhead(tensors, ahead_bytes=16 << 20)

    def touched_mib() -> int:
        ahead.wait()
        return (_private_kib() - before) // 1024

    assert 14 <= touched_mib() <= 32  # whole huge pages
    ahead.reached(100)  # the half of what is ahead is still there
    assert touched_mib() <= 32
    ahead.reached(2048)
    assert 28 <= touched_mib() <= 60  # nothing below that row: it has been written
    ahead.reached(4096)
    ahead.reached(1)
    assert touched_mib() <= 60
    assert not any(x[2000:2300].any() for x in tensors)


class System:
    """Notes the threads that are started and the memory that is asked for ahead, and gives none."""

    def __init__(self, monkeypatch) -> None:
        self.num_started, self.asked, self.answer = 0, [], 0
        self.is_open = threading.Event()
        self.is_open.set()
        start = threading.Thread.start

        def note(thread):
            self.num_started += 1
            start(thread)

        monkeypatch.setattr("threading.Thread.start", note)
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: self)

    def madvise(self, start, size, _) -> int:
        self.asked.append((start.value, start.value + size.value))
        assert self.is_open.wait(10)
        return self.answer


def test_only_what_is_on_the_cpu_and_not_empty_is_touched(monkeypatch):
    system = System(monkeypatch)
    elsewhere = [torch.empty(8, 8, device="meta"), torch.empty(0, 8)]
    TouchedAhead(elsewhere).wait()
    assert system.num_started == 0
    here = lazy_zeros((8, 4096), torch.uint8)
    TouchedAhead([*elsewhere, here]).wait()
    start, stop = here.data_ptr(), here.data_ptr() + here.nbytes
    assert system.asked == [(start - start % PAGESIZE, stop)]


def test_one_thread_at_a_time_and_none_for_a_few_rows(monkeypatch):
    """512 rows ahead, 64 at a time."""
    system = System(monkeypatch)
    rows = lazy_zeros((4096, 2**15), torch.uint8)
    system.is_open.clear()
    ahead = TouchedAhead([rows], ahead_bytes=16 << 20)
    ahead.reached(1)
    assert system.num_started == 1  # it is not done
    system.is_open.set()
    ahead.wait()
    ahead.reached(250)
    assert (system.num_started, len(system.asked)) == (1, 8)
    ahead.reached(300)
    ahead.wait()
    assert system.num_started == 2
    stops = [(stop - rows.data_ptr()) >> 15 for _, stop in system.asked]
    assert stops == [*range(64, 513, 64), 576, 640, 704, 768, 812]  # none again


def test_a_thread_that_may_not_lower_its_priority_goes_on(monkeypatch):
    is_own = []

    def refuse(_, who, __):
        is_own.append(who in (0, threading.get_native_id()))
        raise OSError

    monkeypatch.setattr("os.setpriority", refuse)
    system = System(monkeypatch)
    TouchedAhead([lazy_zeros((4096, 2**15), torch.uint8)], ahead_bytes=16 << 20).wait()
    assert len(system.asked) == 8
    assert is_own == [True]


def test_a_system_that_refuses_is_asked_once(monkeypatch):
    system = System(monkeypatch)
    system.answer = -1
    ahead = TouchedAhead([lazy_zeros((4096, 2**15), torch.uint8)], ahead_bytes=16 << 20)
    for row in (0, 1000, 2000):
        ahead.wait()
        ahead.reached(row)
    assert (system.num_started, len(system.asked)) == (1, 1)


def test_where_there_are_no_more_threads_one_is_tried(monkeypatch):
    tried = []

    def full(thread):
        tried.append(thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", full)
    ahead = TouchedAhead([lazy_zeros((8, 4096), torch.uint8)])
    ahead.reached(1)
    ahead.wait()
    assert len(tried) == 1

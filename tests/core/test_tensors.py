import ctypes
import sys
import threading
from mmap import mmap
from pathlib import Path

import pytest
import torch

from qwen3vl_disagg.core.tensors import HUGE_PAGE, TouchedAhead, lazy_zeros, on_huge_pages
from tests.support.memory_maps import asks_for_huge_pages


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
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def test_memory_is_taken_only_when_written():
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


def test_nothing_is_touched_of_other_devices():
    ahead = TouchedAhead([torch.empty(8, 8, device="meta"), torch.empty(0, 8)])
    ahead.reached(8)
    assert not [thread for thread in threading.enumerate() if thread.name == TouchedAhead.__name__]


def test_a_system_that_refuses_changes_nothing(monkeypatch):
    def refuse(*_):
        raise OSError

    monkeypatch.setattr("os.setpriority", refuse)
    tensors = [lazy_zeros((4096, 2**15), torch.uint8)]
    before = _private_kib()
    ahead = TouchedAhead(tensors, ahead_bytes=16 << 20)
    ahead.wait()
    assert not _populates() or _private_kib() - before > 12 * 1024

    def full(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", full)
    TouchedAhead(tensors).reached(1)

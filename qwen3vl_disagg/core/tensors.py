"""Tensors that cost memory only once they are written, room on huge pages, and a cheap look at all numbers of one."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Zeros. On the CPU the memory is a mapping of its own, untouched: `torch.zeros` writes every page, and so does
    calloc where it has memory that was freed."""
    if torch.device(device).type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    if math.prod(shape) == 0:
        return torch.zeros(*shape, dtype=dtype)
    room = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.from_numpy(np.frombuffer(room, dtype=np.uint8)).view(dtype).view(*shape)


_POPULATE_WRITE = 23
_PRIORITY = 5
_PAUSE, _MAX_PAUSE_S = 9, 0.05
"""A tenth of a core at most, as what computes would have to wait for it."""
HUGE_PAGE = 2 << 20
"""Bytes, on x86-64 and most of arm64."""


def on_huge_pages(x: Tensor) -> Tensor:
    """`x`, whose memory nobody has written yet: on the CPU the kernel is asked for huge pages, as it will be read again
    and again, and a walk over small ones takes longer, above all on a virtual machine. It is free to refuse: then
    nothing changes."""
    if x.device.type == "cpu" and x.nbytes >= HUGE_PAGE and sys.platform == "linux":
        start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = x.data_ptr() + x.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return x


def uploaded(x: Tensor, device: torch.device) -> Tensor:
    """What is on the host, on `device`. On the way to a GPU it is pinned, so that nothing is waited for: a copy of
    memory that can be paged out waits for all that is queued."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def all_finite(x: Tensor) -> bool:
    """Whether no number of `x`, of a float dtype, is NaN or infinite.

    Products with ones are the cheapest look at all of them (on a CPU a sum of bfloat16 has a tenth of their speed). One
    that overflows says nothing, so then each is looked at.
    """
    if x.numel() == 0:
        return True
    rows = x.flatten(0, -2) if x.dim() > 1 else x.view(1, -1)
    return bool(F.linear(rows, rows.new_ones(1, rows.shape[1])).isfinite().all()) or bool(x.isfinite().all())


def are_finite(parts: Sequence[Sequence[Tensor]]) -> list[bool]:
    """`all_finite` of all tensors of each part; of a GPU's all together, so that they are waited for once."""
    if all(x.device.type == "cpu" for part in parts for x in part):
        return [all(map(all_finite, part)) for part in parts]
    return torch.stack([torch.stack([x.isfinite().all() for x in part]).all() for part in parts]).tolist()


class TouchedAhead:
    """Tensors of `lazy_zeros` that are filled from their first row on, all in step: the memory of rows to come is had
    from the system before somebody waits for it (a page that is written for the first time is zeroed by the kernel, and
    on a virtual machine often fetched from the host).

    `ahead_bytes`, over all tensors: how far. By a thread of its own, piece by piece with pauses, that ends once it is
    so far. Where the system cannot do it (MADV_POPULATE_WRITE is Linux 5.14), and for other devices, nothing happens.
    """

    def __init__(self, tensors: Sequence[Tensor], ahead_bytes: int = 64 << 20) -> None:
        self._tensors = [x for x in tensors if x.device.type == "cpu" and x.nbytes] if sys.platform == "linux" else []
        self._num_rows = min((len(x) for x in self._tensors), default=0)
        self._row_bytes = max(1, sum(x.nbytes // len(x) for x in self._tensors))
        self._ahead = max(1, ahead_bytes // self._row_bytes)
        self._touched = 0
        self._thread: threading.Thread | None = None
        self.reached(0)

    def reached(self, row: int) -> None:
        """Rows up to this one are in use."""
        target = min(row + self._ahead, self._num_rows)
        is_near = row + self._ahead // 2 < self._touched  # not a thread for every few rows
        if is_near or target <= self._touched or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(
            target=self._touch, args=(max(row, self._touched), target), daemon=True, name=type(self).__name__
        )
        try:
            self._thread.start()
        except RuntimeError:  # no more threads, or the interpreter ends
            self._thread, self._num_rows = None, 0

    def _touch(self, first: int, stop: int) -> None:
        with contextlib.suppress(OSError):  # some sandboxes forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _PRIORITY)  # of this thread alone
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        step = max(1, HUGE_PAGE * len(self._tensors) // self._row_bytes)
        for row in range(first, stop, step):
            for x in self._tensors:
                began = time.monotonic()
                width, until = x.nbytes // len(x), min(row + step, stop)
                start = (x.data_ptr() + row * width) // mmap.PAGESIZE * mmap.PAGESIZE
                size = x.data_ptr() + until * width - start
                if madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_int(_POPULATE_WRITE)) != 0:
                    self._num_rows = 0  # not here
                    return
                time.sleep(min(_PAUSE * (time.monotonic() - began), _MAX_PAUSE_S))
            self._touched = min(row + step, stop)

    def wait(self) -> None:
        """Until what was begun is done."""
        if self._thread is not None:
            self._thread.join()

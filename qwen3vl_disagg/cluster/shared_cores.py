"""Ranks of one host on its cores: who computes has those of the ranks that do not."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

MAX_RANKS = 512
MOST_THREADS = 16
"""Of a rank that has more than its share: what one step gains by more was not measured."""
STALE_S = 10.0
"""Who has not claimed for so long is not there any more, or waits for something."""
_Claims = ctypes.c_double * MAX_RANKS


class SharedCores:
    """A time for each rank, in a file that all of them map: when it last claimed its cores; 0: it does not compute.

    `claim` before each piece of work (a step, a block of the tower), on the thread that does it: it sets the number of
    threads. `release` before waiting. A claim that others do not see at once costs a piece of work on shared cores,
    nothing else, so nothing is locked.
    """

    def __init__(
        self,
        file: Path,
        slot: int,
        *,
        cores: int,
        share: int,
        set_threads: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`share`: threads where everybody computes. ValueError for a slot that the file has no place for."""
        if not 0 <= slot < MAX_RANKS:
            raise ValueError(f"slot {slot} of {MAX_RANKS}")
        self._slot, self._cores, self._share = slot, cores, share
        self._set_threads, self._clock = set_threads, clock
        self._threads = 0
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(fd, 0, ctypes.sizeof(_Claims))  # a full disk is an error here, and no signal later
            self._claims = _Claims.from_buffer(mmap.mmap(fd, ctypes.sizeof(_Claims)))
        finally:
            os.close(fd)
        self.release()

    def claim(self) -> None:
        """Compute, with as many threads as there are cores for each that does."""
        now = self._clock()
        self._claims[self._slot] = now
        busy = sum(1 for claimed in self._claims[:] if claimed and now - claimed < STALE_S)
        threads = max(self._share, min(self._cores // busy, MOST_THREADS))
        if threads != self._threads:
            self._threads = threads
            self._set_threads(threads)

    def release(self) -> None:
        self._claims[self._slot] = 0.0

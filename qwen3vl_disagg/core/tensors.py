"""Tensors that cost memory only once they are written, room on huge pages, and a cheap look at all numbers of one."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Zeros. On the CPU the memory comes from calloc, untouched (`torch.zeros` writes every page)."""
    if torch.device(device).type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    if math.prod(shape) == 0:
        return torch.zeros(*shape, dtype=dtype)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(*shape)


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


def all_finite(x: Tensor) -> bool:
    """Whether no number of `x`, of a float dtype, is NaN or infinite.

    Products with ones are the cheapest look at all of them (on a CPU a sum of bfloat16 has a tenth of their speed). One
    that overflows says nothing, so then each is looked at.
    """
    if x.numel() == 0:
        return True
    rows = x.flatten(0, -2) if x.dim() > 1 else x.view(1, -1)
    return bool(F.linear(rows, rows.new_ones(1, rows.shape[1])).isfinite().all()) or bool(x.isfinite().all())

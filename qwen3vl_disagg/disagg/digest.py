"""A cheap digest of rows: wrong, missing, swapped or shifted rows change it. No defence against an attacker.

Each row's bytes are summed as int64 words; the sums are added up, modulo 2**64, with a weight for each row's position.
Weights are odd, so that no bit of a row's sum can vanish. Digests of runs of an item's rows add up to the digest of
all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PRIME = 1_000_003
_HALF = 1 << 63


def _wrap(value: int) -> int:
    """Modulo 2**64, as a signed 64-bit number."""
    return (value + _HALF) % (2 * _HALF) - _HALF


def rows_digest(rows: Tensor, start: int = 0) -> int:
    """Digest of contiguous rows `[R, ...]` that are rows `start ..` of an item; a signed 64-bit number.

    Row bytes are read as the widest integer that fits them.
    """
    if rows.numel() == 0:
        return 0
    words = rows.detach().cpu().contiguous().view(len(rows), -1)
    row_bytes = words.shape[1] * words.itemsize
    kind = next(
        dtype
        for dtype, size in ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2), (torch.uint8, 1))
        if row_bytes % size == 0
    )
    sums_R = words.view(kind).sum(1, dtype=torch.int64)
    weights_R = (2 * torch.arange(start, start + len(rows), dtype=torch.int64) + 1) * _PRIME
    return int((sums_R * weights_R).sum())


def add_digests(*digests: int) -> int:
    """The digest of runs that follow one another, from theirs."""
    return _wrap(sum(digests))


def payload_digest(main: Tensor, fill_ids: Tensor, positions: Tensor, deepstack: Tensor) -> int:
    """The digest of an item's four buffers of rows, each with an odd weight, so that they cannot trade places."""
    parts = (main, fill_ids, positions, deepstack)
    return _wrap(sum((2 * i + 1) * rows_digest(part) for i, part in enumerate(parts)))

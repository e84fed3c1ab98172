"""A cheap digest of rows: wrong, missing, swapped or shifted rows change it. No defence against an attacker.

Each row's bytes are summed as int64 words; the sums are added up, modulo 2**64, with a weight for each row's position
and one for its buffer. Weights are odd, so that no bit of a row's sum can vanish. Digests of runs of an item's rows add
up to the digest of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HALF = 1 << 63


def _wrap(value: int) -> int:
    """Modulo 2**64, as a signed 64-bit number."""
    return (value + _HALF) % (2 * _HALF) - _HALF


_GOLDEN = _wrap(0x9E3779B97F4A7C15)
_MIX = _wrap(0xBF58476D1CE4E5B9)
_DEEPSTACK = _wrap(0x94D049BB133111EB)


def row_sums(rows: Tensor) -> Tensor:
    """The sum of each contiguous row's bytes, read as the widest integer that fits them: `[R, ...]` -> `[R]` int64."""
    if rows.numel() == 0:
        return torch.zeros(len(rows), dtype=torch.int64)
    words = rows.detach().cpu().contiguous().view(len(rows), -1)
    row_bytes = words.shape[1] * words.itemsize
    kind = next(
        dtype
        for dtype, size in ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2), (torch.uint8, 1))
        if row_bytes % size == 0
    )
    return words.view(kind).sum(1, dtype=torch.int64)


def _weights(start: int, stop: int) -> Tensor:
    """`[stop - start]` int64, odd, and without small relations among them: a row that gains what another loses shows.

    The finalizer of splitmix64 (Steele, Lea, Flood 2014) over the row's number.
    """
    x = (torch.arange(start, stop, dtype=torch.int64) + 1) * _GOLDEN
    x = (x ^ (x >> 30)) * _MIX
    return (x ^ (x >> 27)) | 1


def sums_digest(sums_R: Tensor, start: int = 0) -> int:
    """The digest of rows `start ..` of an item, from their sums; a signed 64-bit number."""
    return int((sums_R * _weights(start, start + len(sums_R))).sum())


def rows_digest(rows: Tensor, start: int = 0) -> int:
    """Digest of contiguous rows `[R, ...]` that are rows `start ..` of an item."""
    return sums_digest(row_sums(rows), start)


def add_digests(*digests: int) -> int:
    """The digest of runs that follow one another, from theirs."""
    return _wrap(sum(digests))


def run_sums(main: Tensor, fill_ids: Tensor, positions: Tensor) -> Tensor:
    """Sums of rows over the three buffers that share blocks; each buffer has a weight, so none can take another's
    place."""
    return row_sums(main) + _GOLDEN * row_sums(fill_ids) + _MIX * row_sums(positions)


def deepstack_sums(deepstack: Tensor) -> Tensor:
    return _DEEPSTACK * row_sums(deepstack)


def range_digests(sums_R: Tensor, ranges: Sequence[tuple[int, int]]) -> list[int]:
    """One digest for each half-open range of an item's rows."""
    return [sums_digest(sums_R[start:stop], start) for start, stop in ranges]

"""A cheap digest of rows: wrong, missing, swapped or shifted rows change it, and what is swapped or shifted within one.
No defence against an attacker.

A row's bytes are multiplied with 8 columns of weights, a matrix product of int8 in exact whole numbers; what weighs a
byte differs from what weighs any other of the row in at least one column. The 8 sums become one number, and these are
added up, modulo 2**64, with a weight for each row's position and one for its buffer. Weights are odd, so that no bit of
a row's number can vanish. Digests of runs of an item's rows add up to the digest of all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

_HALF = 1 << 63


def _wrap(value: int) -> int:
    """Modulo 2**64, as a signed 64-bit number."""
    return (value + _HALF) % (2 * _HALF) - _HALF


_EXACT_BYTES = 1 << 16
"""So many products of a byte and a weight stay below 2**31."""
_GOLDEN = _wrap(0x9E3779B97F4A7C15)
_MIX = _wrap(0xBF58476D1CE4E5B9)
_DEEPSTACK = _wrap(0x94D049BB133111EB)


def row_sums(rows: Tensor) -> Tensor:
    """A number for each row's bytes and where they stand in it: `[R, ...]` -> `[R]` int64."""
    if rows.numel() == 0:
        return torch.zeros(len(rows), dtype=torch.int64)
    rows, width = rows.detach().cpu().contiguous(), rows[0].numel()
    # Strides of dims of size one are anything, and then no view as bytes.
    bytes_RB = rows.as_strided((len(rows), width), (width, 1)).view(torch.int8)
    sums_R8 = torch.zeros(len(rows), 8, dtype=torch.int64)
    for start in range(0, bytes_RB.shape[1], _EXACT_BYTES):
        stop = min(start + _EXACT_BYTES, bytes_RB.shape[1])
        sums_R8 += torch._int_mm(bytes_RB[:, start:stop], _byte_weights(start, stop))
    return (sums_R8 * _weights(0, 8)).sum(1)


@functools.cache
@torch.inference_mode(False)
def _byte_weights(start: int, stop: int) -> Tensor:
    """`[B, 8]` int8 within -64 .. 63: the upper 7 bits of each byte of a number that no two places have the same of.

    A CPU without instructions for it (VNNI) adds pairs of products up in 16 bits and cuts off what is too much: a byte
    is at most 255 there, and 2 * 255 * 64 < 2**15. So ranks on different CPUs find the same.
    """
    return _mixed(start, stop).view(torch.int8).view(-1, 8) >> 1


def _mixed(start: int, stop: int) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014) over the numbers `start + 1 .. stop`, `[stop - start]`
    int64: no two the same."""
    x = (torch.arange(start, stop, dtype=torch.int64) + 1) * _GOLDEN
    for shift, factor in ((30, _MIX), (27, _DEEPSTACK), (31, 1)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor  # a shift of unsigned numbers
    return x


def _weights(start: int, stop: int) -> Tensor:
    """`[stop - start]` int64, odd, without small relations among them: a row that gains what another loses shows."""
    return _mixed(start, stop) | 1


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


def part_digests(main: Tensor, deepstack: Tensor) -> list[int]:
    """Of an item's rows `[R, h]` and `[R, n * h]`: the main rows' digest, and that of each level."""
    return [rows_digest(part) for part in (main, *deepstack.split(main.shape[1], dim=1)) if part.numel()]


def range_digests(sums_R: Tensor, ranges: Sequence[tuple[int, int]]) -> list[int]:
    """One digest for each half-open range of an item's rows."""
    return [sums_digest(sums_R[start:stop], start) for start, stop in ranges]

"""The row digest: what it must notice, and how digests of runs add up."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.disagg.digest import add_digests, rows_digest
from qwen3vl_disagg.disagg.encode_worker import payload_digest

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
seeds = st.integers(0, 2**32 - 1)


def make_rows(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits, so also NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)
    size = rows * width * dtype.itemsize
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).view(dtype).view(rows, width)


@given(st.integers(1, 12), st.integers(1, 9), st.sampled_from(DTYPES), seeds, st.data())
def test_runs_add_up(rows, width, dtype, seed, data):
    x = make_rows(rows, width, dtype, seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=4)))
    edges = [0, *cuts, rows]
    parts = [rows_digest(x[a:b], start=a) for a, b in pairwise(edges)]
    assert add_digests(*parts) == rows_digest(x)
    assert -(2**63) <= rows_digest(x) < 2**63


@given(st.integers(2, 12), st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16]), seeds, st.data())
def test_swapped_shifted_and_lost_rows_show(rows, width, dtype, seed, data):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    digest = rows_digest(x)
    i, j = data.draw(st.lists(st.integers(0, rows - 1), min_size=2, max_size=2, unique=True))
    swapped = x.clone()
    swapped[[i, j]] = x[[j, i]]
    lost = x.clone()
    lost[i] = 0
    for other in (swapped, lost, x.roll(1, 0)):
        assert torch.equal(other, x) or rows_digest(other) != digest
    assert rows_digest(x, start=1) != digest


@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from(DTYPES[:4]), seeds, st.data())
def test_a_changed_low_byte_shows(rows, width, dtype, seed, data):
    x = make_rows(rows, width, dtype, seed)
    damaged = x.clone()
    row = data.draw(st.integers(0, rows - 1))
    column = data.draw(st.integers(0, width - 1)) * dtype.itemsize
    damaged.view(torch.uint8).view(rows, -1)[row, column] ^= data.draw(st.integers(1, 255))
    assert rows_digest(damaged) != rows_digest(x)


def test_every_single_bit_shows():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    missed = []
    for bit in range(x.numel() * 32):
        damaged = x.clone()
        damaged.view(torch.uint8).view(-1)[bit // 8] ^= 1 << (bit % 8)
        if rows_digest(damaged) == rows_digest(x):
            missed.append((bit // 256, bit % 256 // 32, bit % 32))
    assert not missed, f"{len(missed)} of 1024 bits are not seen; (row, column, bit): {missed[:8]}"


def test_main_and_deepstack_rows_cannot_trade_places():
    generator = torch.Generator().manual_seed(0)
    main, level = (torch.randn(4, 8, generator=generator) for _ in range(2))
    fill_ids, positions = torch.full((4,), 60, dtype=torch.int32), torch.zeros(4, 3, dtype=torch.int32)
    assert payload_digest(main, fill_ids, positions, level) != payload_digest(level, fill_ids, positions, main)


def test_the_digest_is_of_the_rows_not_of_their_memory():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([x, x], dim=1)
    assert rows_digest(wide[:, :8]) == rows_digest(x)
    assert rows_digest(x[:0]) == rows_digest(torch.zeros(6, 0)) == 0


def test_every_buffer_of_a_payload_counts():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, 8, generator=generator), torch.full((4,), 60, dtype=torch.int32)]
    parts += [torch.ones(4, 3, dtype=torch.int32), torch.randn(4, 16, generator=generator)]
    digest = payload_digest(*parts)
    for i, part in enumerate(parts):
        damaged = [*parts]
        damaged[i] = part + 1
        assert payload_digest(*damaged) != digest

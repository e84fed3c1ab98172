"""The row digest: what it must notice, and how digests of runs add up."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qwen3vl_disagg.protocol.layout import item_ranges
from qwen3vl_disagg.transport.digest import (
    _byte_weights,
    add_digests,
    deepstack_sums,
    range_digests,
    row_sums,
    rows_digest,
    run_sums,
    sums_digest,
)

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


def make_buffers(rows: int, seed: int, width: int = 8) -> list[torch.Tensor]:
    """main, fill_ids, positions, DeepStack; all of them random, so that none is special."""
    generator = torch.Generator().manual_seed(seed)
    main, deepstack = (torch.randn(rows, width, generator=generator) for _ in range(2))
    fill_ids = torch.randint(0, 99, (rows,), generator=generator, dtype=torch.int32)
    return [main, fill_ids, torch.randint(0, 99, (rows, 3), generator=generator, dtype=torch.int32), deepstack]


def item_digest(main, fill_ids, positions, deepstack) -> int:
    return add_digests(sums_digest(run_sums(main, fill_ids, positions)), sums_digest(deepstack_sums(deepstack)))


@given(st.integers(1, 12), st.lists(st.integers(1, 6), max_size=5), st.lists(st.integers(1, 6), max_size=5), seeds)
def test_any_two_cuts_of_an_item_add_up_to_it(rows, row_cut, deepstack_cut, seed):
    """Embedding runs and DeepStack runs are cut independently of one another, over any number of grants."""
    main, fill_ids, positions, deepstack = make_buffers(rows, seed)

    def ranges(cut):
        found = [(a, min(b, rows)) for a, b in item_ranges([*cut, rows], 0)]
        return [(a, b) for a, b in found if a < b]

    got = [
        sums_digest(run_sums(main[a:b], fill_ids[a:b], positions[a:b]), a) for a, b in ranges(row_cut)
    ] + range_digests(deepstack_sums(deepstack), ranges(deepstack_cut))
    assert add_digests(*got) == item_digest(main, fill_ids, positions, deepstack)


@given(st.integers(1, 8), seeds)
@example(rows=2, seed=152055)  # what one row gained the next one lost, and weights of 1 and 3 did not tell
def test_buffers_that_trade_places_show(rows, seed):
    main, fill_ids, positions, deepstack = make_buffers(rows, seed)
    digest = item_digest(main, fill_ids, positions, deepstack)
    assert item_digest(deepstack, fill_ids, positions, main) != digest
    other = positions[:, 0].contiguous()
    if not torch.equal(other, fill_ids):
        swapped = positions.clone()
        swapped[:, 0] = fill_ids
        assert item_digest(main, other, swapped, deepstack) != digest


@given(st.integers(2, 8), st.sampled_from(range(4)), seeds, st.data())
def test_every_buffer_of_a_payload_counts(rows, which, seed, data):
    """Lost, swapped and shifted rows of one buffer alone."""
    buffers = make_buffers(rows, seed)
    digest = item_digest(*buffers)
    i, j = data.draw(st.lists(st.integers(0, rows - 1), min_size=2, max_size=2, unique=True))
    rows_of = buffers[which]
    swapped, lost = rows_of.clone(), rows_of.clone()
    swapped[[i, j]] = rows_of[[j, i]]
    lost[i] = 0
    for other in (swapped, lost, rows_of.roll(1, 0), rows_of + 1):
        same_sums = torch.equal(row_sums(other), row_sums(rows_of))
        assert same_sums or item_digest(*[other if n == which else b for n, b in enumerate(buffers)]) != digest


@given(st.integers(2, 8), seeds, st.data())
def test_rows_of_one_run_in_the_place_of_another_show(rows, seed, data):
    """What a run's own digest says depends on where in the item it lies."""
    main, fill_ids, positions, _ = make_buffers(rows, seed)
    sums = run_sums(main, fill_ids, positions)
    start = data.draw(st.integers(1, rows - 1))
    assert sums_digest(sums[start:], start) != sums_digest(sums[start:], start - 1)


def test_the_digest_is_of_the_rows_not_of_their_memory():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([x, x], dim=1)
    assert rows_digest(wide[:, :8]) == rows_digest(x)
    assert rows_digest(x[:0]) == rows_digest(torch.zeros(6, 0)) == 0
    assert range_digests(row_sums(x), []) == []


# ---- within a row ----


@given(st.integers(1, 3), st.integers(2, 24), st.sampled_from(DTYPES), seeds, st.data())
def test_words_that_move_within_a_row_show(rows, width, dtype, seed, data):
    x = make_rows(rows, width, dtype, seed)
    row, kind = data.draw(st.integers(0, rows - 1)), data.draw(st.sampled_from(["swap", "roll", "any"]))
    order = list(range(width))
    if kind == "swap":
        i, j = data.draw(st.lists(st.integers(0, width - 1), min_size=2, max_size=2, unique=True))
        order[i], order[j] = order[j], order[i]
    else:
        order = order[1:] + order[:1] if kind == "roll" else data.draw(st.permutations(order))
    moved = x.clone()
    moved[row] = x[row, order]
    is_same = torch.equal(moved.view(torch.uint8), x.view(torch.uint8))
    assert (rows_digest(moved) == rows_digest(x)) == is_same


def test_levels_that_are_swapped_within_a_row_show():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        levels = torch.randn(5, 3, 32, generator=generator).to(dtype)
        digest = sums_digest(deepstack_sums(levels.flatten(1)))
        for order in ([1, 0, 2], [0, 2, 1], [2, 1, 0], [1, 2, 0]):
            for row in range(5):
                swapped = levels.clone()
                swapped[row] = levels[row, order]
                assert sums_digest(deepstack_sums(swapped.flatten(1))) != digest


def test_places_that_trade_one_bit_show():
    """Whatever the bit and the distance, also the highest one of two words."""
    for width in (2, 16, 100):
        places = torch.eye(width, dtype=torch.int64)
        for bit in range(64):
            ones = places * (1 << bit if bit < 63 else -(2**63))
            assert len(row_sums(ones).unique()) == width


def test_rows_of_any_length():
    """Longer ones than whole numbers of 32 bits hold the sum of; and every row by itself is as among others."""
    largest = torch.full((2, 300_000), -128, dtype=torch.int8)
    x = torch.randn(3, 70_001, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for rows in (largest, x):
        assert torch.equal(row_sums(rows), torch.cat([row_sums(row[None]) for row in rows]))
    changed = x.clone()
    changed[1, 70_000] = changed[1, 2] + 1
    assert row_sums(changed)[1] != row_sums(x)[1]


_ON_ANOTHER_CPU = """
import torch
from qwen3vl_disagg.transport.digest import row_sums
rows = [torch.randint(-128, 128, (9, 515), generator=torch.Generator().manual_seed(0), dtype=torch.int8)]
rows += [torch.full((3, 66), level, dtype=torch.int8) for level in (-128, 127)]
sums = [row_sums(part).tolist() for part in rows]
"""


def test_every_cpu_finds_the_same():
    """Those without instructions for whole products add pairs of them up in 16 bits, which must not be full."""
    places = _byte_weights(0, 2**18)
    assert places.abs().max() <= (2**15 - 1) // (2 * 255)
    assert len(places.unique(dim=0)) == 2**18
    here: dict[str, object] = {}
    exec(_ON_ANOTHER_CPU, here)
    there = subprocess.run(
        [sys.executable, "-c", _ON_ANOTHER_CPU + "print(sums)"],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert there == f"{here['sums']}\n"

"""Row sizes and runs, against a row-by-row reference."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.protocol.layout import AUX_FIELDS, RUN_BYTES, RowSizes, blocks_for, item_ranges, row_runs
from qwen3vl_disagg.transport.buffers import MultimodalDataBuffers
from tests.support.random_model import small_config

block_sizes = st.integers(1, 9)
tables = st.lists(st.integers(0, 20), max_size=12, unique=True)
limits = st.none() | st.integers(1, 20)


@given(tables, block_sizes, limits, st.data())
def test_runs_name_the_rows_of_the_blocks_in_order(blocks, block_size, max_rows, data):
    rows = data.draw(st.integers(0, len(blocks) * block_size))
    runs = row_runs(blocks, block_size, rows, max_rows)
    every_row = [block * block_size + i for block in blocks for i in range(block_size)]
    assert [row for start, stop in runs for row in range(start, stop)] == every_row[:rows]
    lengths = [stop - start for start, stop in runs]
    assert all(1 <= length <= (max_rows or rows) for length in lengths)
    for (first, second), length in zip(pairwise(runs), lengths[:-1], strict=True):
        assert first[1] != second[0] or length == max_rows, "neighbours were not joined"


@given(tables, block_sizes, limits, st.integers(0, 9), st.data())
def test_lengths_of_runs_are_ranges_of_the_item(blocks, block_size, max_rows, start, data):
    rows = data.draw(st.integers(0, len(blocks) * block_size))
    lengths = [b - a for a, b in row_runs(blocks, block_size, rows, max_rows)]
    ranges = list(item_ranges(lengths, start))
    assert [row for low, high in ranges for row in range(low, high)] == list(range(start, start + rows))
    assert [high - low for low, high in ranges] == lengths


def test_the_examples_of_the_module():
    assert row_runs([3, 4, 9], 4, 10) == [(12, 20), (36, 38)]
    assert row_runs([3, 4, 9], 4, 10, 6) == [(12, 18), (18, 20), (36, 38)]
    assert list(item_ranges([6, 2, 2], 5)) == [(5, 11), (11, 13), (13, 15)]


@given(tables, block_sizes, limits)
def test_more_rows_than_the_blocks_hold_are_refused(blocks, block_size, max_rows):
    with pytest.raises(ValueError, match="do not fit"):
        row_runs(blocks, block_size, len(blocks) * block_size + 1, max_rows)


@given(st.integers(0, 1000), block_sizes)
def test_blocks_are_enough_and_not_one_too_many(rows, block_size):
    blocks = blocks_for(rows, block_size)
    assert blocks * block_size >= rows > (blocks - 1) * block_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_sizes_are_those_of_the_buffers(levels, dtype):
    config = small_config(levels=levels)
    buffers = MultimodalDataBuffers(config, num_rows=24, num_deepstack_rows=12, num_slots=5, block_size=4, dtype=dtype)
    sizes = buffers.row_sizes
    for name in ("input_embeddings", "fill_ids", "mrope_positions", "aux_datas", "deepstack_embeddings"):
        buffer = getattr(buffers, name)
        assert getattr(sizes, name) * len(buffer) == buffer.numel() * buffer.itemsize, name
    assert buffers.deepstack_embeddings.shape == (12, levels * 32)
    assert buffers.allocator.totals == {"rows": 6, "deepstack": 3, "slots": 5}
    views = [view for run in buffers.row_views([5, 0, 2], [4, 4, 2]) for view in run]
    views += [buffers.aux_view(3), *buffers.deepstack_views([2, 0], [4, 1])]
    assert sizes.transfer_bytes(10, 5) == sum(view.numel() * view.itemsize for view in views)
    assert sizes.transfer_bytes(10, 0, aux=False) == 10 * (sizes.per_row - sizes.deepstack_embeddings)


def test_sizes_of_the_published_30b_model():
    sizes = RowSizes.of(hidden_size=2048, num_levels=3, itemsize=2)
    assert sizes.input_embeddings + sizes.deepstack_embeddings == 16 * 1024
    assert sizes.aux_datas == 8 * len(AUX_FIELDS)
    assert sizes.max_run_rows * sizes.input_embeddings == RUN_BYTES
    assert sizes.max_deepstack_run_rows * sizes.deepstack_embeddings <= RUN_BYTES


def test_a_run_has_at_least_one_row():
    huge = RowSizes.of(hidden_size=RUN_BYTES, num_levels=3, itemsize=2)
    assert huge.max_run_rows == huge.max_deepstack_run_rows == 1
    assert RowSizes.of(hidden_size=8, num_levels=0, itemsize=2).max_deepstack_run_rows >= 1


@pytest.mark.parametrize("sizes", [(10, 8), (8, 10)])
def test_pools_that_blocks_do_not_fill_are_refused(sizes):
    with pytest.raises(ValueError, match="blocks of 4"):
        MultimodalDataBuffers(small_config(), num_rows=sizes[0], num_deepstack_rows=sizes[1], block_size=4)


@pytest.mark.parametrize("lengths", [[8], [4, 4, 2], [4, 5], [9, 1]])
def test_views_are_only_for_the_runs_that_the_blocks_make(lengths):
    """Blocks 1 and 2 are neighbours: 10 rows in blocks 1, 2, 4 are runs of 8 and 2."""
    buffers = MultimodalDataBuffers(small_config(), num_rows=24, block_size=4)
    assert [len(rows) for rows, _, _ in buffers.row_views([1, 2, 4], [8, 2])] == [8, 2]
    with pytest.raises(ValueError, match="not how blocks"):
        buffers.row_views([1, 2, 4], lengths if sum(lengths) != 8 else [4, 4])
    with pytest.raises(ValueError, match="not how blocks"):
        buffers.deepstack_views([1, 2, 4], lengths if sum(lengths) != 8 else [4, 4])


@given(st.permutations(list(range(6))), st.integers(1, 24))
def test_views_are_the_blocks_rows_in_order_and_disjoint(order, rows):
    """Each row of the pool is numbered; the views in payload order show the numbers of the item's blocks."""
    buffers = MultimodalDataBuffers(small_config(), num_rows=24, block_size=4)
    numbers = torch.arange(24)
    buffers.input_embeddings[:] = numbers[:, None]
    buffers.deepstack_embeddings[:] = -numbers[:, None]
    buffers.fill_ids[:] = numbers
    buffers.mrope_positions[:] = numbers[:, None]
    lengths = [b - a for a, b in row_runs(order, 4, rows)]
    expected = [order[row // 4] * 4 + row % 4 for row in range(rows)]
    main, fill_ids, positions = (torch.cat(part) for part in zip(*buffers.row_views(order, lengths), strict=True))
    assert main[:, 0].tolist() == main[:, 31].tolist() == fill_ids.tolist() == positions[:, 2].tolist() == expected
    deepstack = buffers.deepstack_views(order, lengths)
    assert (-torch.cat(deepstack)[:, 0]).tolist() == expected
    assert all(view.is_contiguous() for view in deepstack)

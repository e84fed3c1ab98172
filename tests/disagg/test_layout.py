"""Row sizes and runs, against a row-by-row reference."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.disagg.buffers import MultimodalDataBuffers
from qwen3vl_disagg.disagg.layout import AUX_FIELDS, RowSizes, blocks_for, row_runs
from tests.support.random_model import small_config

block_sizes = st.integers(1, 9)
tables = st.lists(st.integers(0, 40), max_size=12, unique=True)


@given(tables, block_sizes, st.data())
def test_runs_name_the_rows_of_the_blocks_in_order(blocks, block_size, data):
    rows = data.draw(st.integers(0, len(blocks) * block_size))
    runs = row_runs(blocks, block_size, rows)
    every_row = [block * block_size + i for block in blocks for i in range(block_size)]
    assert [row for start, stop in runs for row in range(start, stop)] == every_row[:rows]
    assert all(start < stop for start, stop in runs)
    assert all(first[1] != second[0] for first, second in pairwise(runs)), "neighbours were not joined"


@given(tables, block_sizes)
def test_more_rows_than_the_blocks_hold_are_refused(blocks, block_size):
    with pytest.raises(ValueError, match="do not fit"):
        row_runs(blocks, block_size, len(blocks) * block_size + 1)


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
    lease = buffers.grant("a", 10)
    assert lease is not None
    moved = sum(view.numel() * view.itemsize for view in buffers.receive_views(lease, 10))
    assert sizes.transfer_bytes(10, 10) == moved
    assert sizes.transfer_bytes(1, 1) - sizes.aux_datas == sizes.per_row


def test_sizes_of_the_published_30b_model():
    sizes = RowSizes.of(hidden_size=2048, num_levels=3, itemsize=2)
    assert sizes.input_embeddings + sizes.deepstack_embeddings == 16 * 1024
    assert sizes.aux_datas == 8 * len(AUX_FIELDS)


@pytest.mark.parametrize("sizes", [(10, 8), (8, 10)])
def test_pools_that_blocks_do_not_fill_are_refused(sizes):
    with pytest.raises(ValueError, match="blocks of 4"):
        MultimodalDataBuffers(small_config(), num_rows=sizes[0], num_deepstack_rows=sizes[1], block_size=4)


@given(st.permutations(list(range(6))), st.integers(1, 10), st.data())
def test_what_is_received_into_the_views_is_what_is_gathered(order, rows, data):
    """Blocks anywhere and in any state of the pool: the views in payload order and the gathered rows agree."""
    buffers = MultimodalDataBuffers(small_config(), num_rows=24, num_deepstack_rows=28, block_size=4, num_slots=7)
    buffers.allocator.grant("shift", 0, 1)  # so that the two tables never hold the same ids
    leases = [buffers.grant(str(i), 4) for i in range(6)]
    for i in order[: data.draw(st.integers(3, 6))]:
        buffers.allocator.free(leases[i])
    lease = buffers.grant("item", rows)
    assert lease is not None
    assert lease.rows != lease.deepstack
    generator = torch.Generator().manual_seed(rows)
    sent = [
        torch.randn(rows, 32, generator=generator),
        torch.randint(0, 99, (rows,), generator=generator, dtype=torch.int32),
        torch.randint(0, 99, (rows, 3), generator=generator, dtype=torch.int32),
        torch.randint(0, 99, (len(AUX_FIELDS),), generator=generator),
        torch.randn(rows, 64, generator=generator),
    ]
    runs, deepstack_runs = (
        [stop - start for start, stop in row_runs(blocks, 4, rows)] for blocks in (lease.rows, lease.deepstack)
    )
    pieces = [piece for part in sent[:3] for piece in part.split(runs)]
    pieces += [sent[3], *sent[4].split(deepstack_runs)]
    views = buffers.receive_views(lease, rows)
    assert [(v.shape, v.dtype) for v in views] == [(p.shape, p.dtype) for p in pieces]
    assert all(view.is_contiguous() for view in views)
    for view, piece in zip(views, pieces, strict=True):
        view.copy_(piece)
    assert all(torch.equal(a, b) for a, b in zip(buffers.gather(lease, rows), sent, strict=True))

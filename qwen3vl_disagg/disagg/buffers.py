"""The five buffers of a language rank, and what lies where in them."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3vl_disagg.core.tensors import lazy_zeros
from qwen3vl_disagg.disagg.allocator import BlockAllocator, Lease
from qwen3vl_disagg.disagg.layout import AUX_FIELDS, RowSizes, blocks_for, row_runs
from qwen3vl_disagg.model.config import ModelConfig

DEFAULT_BLOCK_SIZE = 128
"""Rows per block."""
DEFAULT_ROWS = 16384


class MultimodalDataBuffers:
    """Room for visual rows on their way into a prompt.

    | buffer | shape | dtype |
    |---|---|---|
    | input_embeddings | `[num_rows, h]` | the model's |
    | fill_ids | `[num_rows]` | int32, the placeholder's token id |
    | mrope_positions | `[num_rows, 3]` | int32, from 0 within the item |
    | aux_datas | `[num_slots, len(AUX_FIELDS)]` | int64 |
    | deepstack_embeddings | `[num_deepstack_rows, n * h]` | the model's |

    Rows 0-2 share blocks; DeepStack rows have a table of their own. `allocator` says who owns what.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_rows: int,
        num_deepstack_rows: int | None = None,
        num_slots: int = 64,
        block_size: int = DEFAULT_BLOCK_SIZE,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        num_deepstack_rows = num_rows if num_deepstack_rows is None else num_deepstack_rows
        if block_size < 1 or num_rows % block_size or num_deepstack_rows % block_size:
            raise ValueError(f"{num_rows} rows and {num_deepstack_rows} DeepStack rows in blocks of {block_size}")
        hidden, levels = config.text.hidden_size, config.num_deepstack_levels
        self.hidden_size, self.num_levels, self.block_size = hidden, levels, block_size
        self.input_embeddings = lazy_zeros((num_rows, hidden), dtype, device)
        self.fill_ids = lazy_zeros((num_rows,), torch.int32)
        self.mrope_positions = lazy_zeros((num_rows, 3), torch.int32)
        self.aux_datas = torch.zeros(num_slots, len(AUX_FIELDS), dtype=torch.int64)
        self.deepstack_embeddings = lazy_zeros((num_deepstack_rows, levels * hidden), dtype, device)
        self.allocator = BlockAllocator(
            num_blocks=num_rows // block_size,
            num_deepstack_blocks=num_deepstack_rows // block_size,
            num_slots=num_slots,
        )
        self.row_sizes = RowSizes.of(hidden_size=hidden, num_levels=levels, itemsize=dtype.itemsize)

    @classmethod
    def for_largest_item(
        cls, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str
    ) -> MultimodalDataBuffers:
        """DEFAULT_ROWS rows: the largest picture under the usual limit of 16 Mpx, or many smaller ones."""
        return cls(config, num_rows=DEFAULT_ROWS, dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        return self.input_embeddings.dtype

    def could_ever_fit(self, rows: int) -> bool:
        """Whether an item of `rows` fits the empty pools."""
        blocks = blocks_for(rows, self.block_size)
        return self.allocator.could_ever_fit(blocks, blocks if self.num_levels else 0)

    def grant(self, owner: str, rows: int) -> Lease | None:
        """Room for a whole item of `rows`, or None."""
        blocks = blocks_for(rows, self.block_size)
        return self.allocator.grant(owner, blocks, blocks if self.num_levels else 0)

    def receive_views(self, lease: Lease, rows: int) -> list[Tensor]:
        """Contiguous views to receive an item into, in payload order: embeddings, fill_ids, positions (each run by
        run), aux, DeepStack (run by run)."""
        runs = row_runs(lease.rows, self.block_size, rows)
        views = [
            buffer[start:stop]
            for buffer in (self.input_embeddings, self.fill_ids, self.mrope_positions)
            for start, stop in runs
        ]
        views.append(self.aux_datas[lease.slot])
        if self.num_levels:
            deepstack_runs = row_runs(lease.deepstack, self.block_size, rows)
            views += [self.deepstack_embeddings[start:stop] for start, stop in deepstack_runs]
        return views

    def gather(self, lease: Lease, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Copies of an item's embeddings, fill_ids, positions, aux and DeepStack, in the item's order."""
        runs = row_runs(lease.rows, self.block_size, rows)
        deepstack_runs = row_runs(lease.deepstack, self.block_size, rows) if self.num_levels else []
        embeddings, fill_ids, positions = (
            torch.cat([buffer[start:stop] for start, stop in runs])
            for buffer in (self.input_embeddings, self.fill_ids, self.mrope_positions)
        )
        deepstack = (
            torch.cat([self.deepstack_embeddings[start:stop] for start, stop in deepstack_runs])
            if deepstack_runs
            else self.deepstack_embeddings.new_zeros(rows, 0)
        )
        return embeddings, fill_ids, positions, self.aux_datas[lease.slot].clone(), deepstack

"""The five buffers of a language rank, what lies where in them, and an item's rows as the engine reads them there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen3vl_disagg.core.copies import Arrival, Uploads
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.requests import ItemTimings
from qwen3vl_disagg.core.settings import BufferOptions
from qwen3vl_disagg.core.tensors import lazy_zeros
from qwen3vl_disagg.model.config import ModelConfig
from qwen3vl_disagg.protocol.allocator import BlockAllocator
from qwen3vl_disagg.protocol.layout import AUX_FIELDS, RowSizes, row_runs


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
        block_size: int = BufferOptions.block_size,
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
        blocks = (self.input_embeddings, self.deepstack_embeddings)
        self.uploads = Uploads(blocks) if self.input_embeddings.device.type == "cuda" else None
        """How rows come into blocks on a GPU."""

    @staticmethod
    def check(config: ModelConfig, options: BufferOptions) -> None:
        """InputError naming the option that cannot be."""
        size = options.block_size
        for name, value in (("block-size", size), ("blocks", options.blocks)):
            if not 1 <= value <= 1 << 24:
                raise InputError(f"--{name} must be 1 to {1 << 24}, got {value}", param=name)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        row_bytes = RowSizes.of(
            hidden_size=config.text.hidden_size, num_levels=config.num_deepstack_levels, itemsize=2
        ).per_row
        if size * options.blocks * row_bytes > memory:
            raise InputError(
                f"--blocks {options.blocks} of --block-size {size} rows: more than the {memory >> 30} GiB of memory",
                param="blocks",
            )
        rows = options.deepstack_rows
        if rows is not None and config.num_deepstack_levels and not size <= rows <= 1 << 30:
            raise InputError(f"--deepstack-rows must be at least a block, {size}, got {rows}", param="deepstack-rows")

    @classmethod
    def from_options(
        cls, config: ModelConfig, options: BufferOptions, *, dtype: torch.dtype, device: torch.device | str
    ) -> MultimodalDataBuffers:
        """What `--block-size`, `--blocks` and `--deepstack-rows` ask for. InputError naming what cannot be."""
        cls.check(config, options)
        size = options.block_size
        num_rows = size * options.blocks
        deepstack_rows = num_rows if options.deepstack_rows is None else options.deepstack_rows // size * size
        return cls(
            config, num_rows=num_rows, num_deepstack_rows=deepstack_rows, block_size=size, dtype=dtype, device=device
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.input_embeddings.dtype

    def aux_view(self, slot: int) -> Tensor:
        """`[len(AUX_FIELDS)]`"""
        return self.aux_datas[slot]

    def row_views(self, blocks: Sequence[int], lengths: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Embeddings, fill_ids and positions of each run of a grant: contiguous views."""
        return [
            (self.input_embeddings[start:stop], self.fill_ids[start:stop], self.mrope_positions[start:stop])
            for start, stop in self._runs(blocks, lengths, self.row_sizes.max_run_rows)
        ]

    def deepstack_views(self, blocks: Sequence[int], lengths: Sequence[int]) -> list[Tensor]:
        """DeepStack rows of each run of a grant: contiguous views."""
        runs = self._runs(blocks, lengths, self.row_sizes.max_deepstack_run_rows)
        return [self.deepstack_embeddings[start:stop] for start, stop in runs]

    def _runs(self, blocks: Sequence[int], lengths: Sequence[int], max_rows: int) -> list[tuple[int, int]]:
        runs = row_runs(blocks, self.block_size, sum(lengths), max_rows)
        if [stop - start for start, stop in runs] != list(lengths):
            raise ValueError(f"runs {list(lengths)} are not how blocks {list(blocks)} lie")
        return runs


Pieces = tuple[tuple[int, Tensor], ...]
"""(number of its first row within the item, rows): contiguous pieces in the item's order."""


@dataclass(frozen=True)
class VisualRows:
    """Rows [start, stop) of one attempt at an item: main pieces `[r, h]`, DeepStack pieces `[r, n * h]`.

    A view, not a copy: the rows stay where they are until whoever reads them says that they are used.
    """

    attempt: int
    start: int
    stop: int
    main: Pieces
    deepstack: Pieces
    arrival: Arrival | None = field(default=None, kw_only=True)
    """On a GPU: when they are there."""

    def write(self, start: int, stop: int, main_out: Tensor, deepstack_out: Tensor | None) -> None:
        """Copy rows [start, stop) into `[stop - start, h]` and `[stop - start, n * h]`.

        ValueError if not all of them are here. `deepstack_out` is None for a model without levels.
        """
        with contextlib.nullcontext() if self.arrival is None else self.arrival.reading():
            self._copy(self.main, start, stop, main_out)
            if deepstack_out is not None and deepstack_out.shape[1]:
                self._copy(self.deepstack, start, stop, deepstack_out)

    def _copy(self, pieces: Pieces, start: int, stop: int, out: Tensor) -> None:
        copied = 0
        for first, piece in pieces:
            low, high = max(start, first), min(stop, first + len(piece))
            if low < high:
                out[low - start : high - start] = piece[low - first : high - first].to(out)
                copied += high - low
        if copied != stop - start:
            raise ValueError(f"{copied} of rows {start}..{stop} are here ({self.start}..{self.stop} were announced)")


@dataclass(frozen=True)
class Delivery:
    """Rows of an item that are here now, and what it took so far: the encoder's times, the payloads' time and bytes."""

    request_id: str
    item: int
    rows: VisualRows
    timings: ItemTimings

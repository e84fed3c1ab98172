"""Where rows lie: sizes of the five buffers' rows, and runs of rows. Pure arithmetic.

A grant gives an item blocks of `block_size` rows. Blocks that happen to be neighbours form one run, so that a transfer
moves few large pieces. Example with block_size 4 and blocks [3, 4, 9] for 10 rows: runs (12, 20) and (36, 38).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

AUX_FIELDS = ("rows", "frames", "height", "width", "levels", "hidden", "digest", "attempt")
"""The aux buffer's columns, int64."""


@dataclass(frozen=True)
class RowSizes:
    """Bytes of one row of each buffer (of one slot for aux)."""

    input_embeddings: int
    fill_ids: int
    mrope_positions: int
    aux_datas: int
    deepstack_embeddings: int

    @classmethod
    def of(cls, *, hidden_size: int, num_levels: int, itemsize: int) -> RowSizes:
        return cls(
            input_embeddings=hidden_size * itemsize,
            fill_ids=4,
            mrope_positions=3 * 4,
            aux_datas=len(AUX_FIELDS) * 8,
            deepstack_embeddings=num_levels * hidden_size * itemsize,
        )

    @property
    def per_row(self) -> int:
        """Bytes that a visual row costs on the wire, DeepStack included."""
        return self.input_embeddings + self.fill_ids + self.mrope_positions + self.deepstack_embeddings

    def transfer_bytes(self, rows: int, deepstack_rows: int) -> int:
        """Bytes of a transfer's payload."""
        embedding = self.input_embeddings + self.fill_ids + self.mrope_positions
        return rows * embedding + deepstack_rows * self.deepstack_embeddings + self.aux_datas


def blocks_for(rows: int, block_size: int) -> int:
    """Blocks that `rows` fill."""
    return -(-rows // block_size)


def row_runs(blocks: Sequence[int], block_size: int, rows: int) -> list[tuple[int, int]]:
    """Half-open runs of buffer rows that hold an item's first `rows` rows, in the item's order."""
    if rows > len(blocks) * block_size:
        raise ValueError(f"{rows} rows do not fit {len(blocks)} blocks of {block_size}")
    runs: list[tuple[int, int]] = []
    left = rows
    for block in blocks[: blocks_for(rows, block_size)]:
        start, length = block * block_size, min(block_size, left)
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + length)
        else:
            runs.append((start, start + length))
        left -= length
    return runs

"""Where rows lie: sizes of the five buffers' rows, and runs of rows. Pure arithmetic.

A grant gives an item blocks of `block_size` rows. Blocks that happen to be neighbours form one run, so that a transfer
moves few large pieces; a run is cut where it gets longer than `max_rows`. Example with block_size 4 and blocks
[3, 4, 9] for 10 rows: runs (12, 20) and (36, 38); with max_rows 6: (12, 18), (18, 20), (36, 38).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

AUX_FIELDS = ("rows", "frames", "height", "width", "levels", "hidden", "digest", "attempt")
"""The aux buffer's columns, int64."""

RUN_BYTES = 2 << 20
"""A run is not longer than this (but at least one row)."""
MAX_RUNS = 1024
"""Runs in one grant, so that grant and header fit their frames; more is resumed."""


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

    def transfer_bytes(self, rows: int, deepstack_rows: int, *, aux: bool = True) -> int:
        """Bytes of a transfer's payload."""
        embedding = self.input_embeddings + self.fill_ids + self.mrope_positions
        return rows * embedding + deepstack_rows * self.deepstack_embeddings + (self.aux_datas if aux else 0)

    @property
    def max_run_rows(self) -> int:
        return max(1, RUN_BYTES // max(1, self.input_embeddings))

    @property
    def max_deepstack_run_rows(self) -> int:
        return max(1, RUN_BYTES // max(1, self.deepstack_embeddings))


def blocks_for(rows: int, block_size: int) -> int:
    """Blocks that `rows` fill."""
    return -(-rows // block_size)


def row_runs(blocks: Sequence[int], block_size: int, rows: int, max_rows: int | None = None) -> list[tuple[int, int]]:
    """Half-open runs of buffer rows that hold the first `rows` rows of these blocks, in the item's order."""
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
    if max_rows is None:
        return runs
    return [(low, min(stop, low + max_rows)) for start, stop in runs for low in range(start, stop, max_rows)]


def item_ranges(runs: Sequence[int], start: int) -> Iterator[tuple[int, int]]:
    """Lengths of runs that follow one another from row `start` of an item -> half-open ranges of the item's rows."""
    for length in runs:
        yield start, start + length
        start += length

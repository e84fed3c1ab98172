"""Page ids of running sequences as a tensor. What a step writes is what is new, whatever the length of the contexts."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qwen3vl_disagg.engine.sequence import Sequence


@dataclass
class _Entry:
    """The row of a sequence, and how many of its pages are in it since it came in for this time."""

    row: int
    stay: int
    num_written: int = 0


class PageTables:
    """`[rows, width]` int64 on the host, a row for each sequence that is there; zeros behind its pages."""

    def __init__(self) -> None:
        self._table = torch.zeros(4, 16, dtype=torch.int64)
        self._array = self._table.numpy()  # the same memory: writing a few numbers costs a tenth
        self._batch = torch.empty(0, dtype=torch.int64)
        self._entries: WeakKeyDictionary[Sequence, _Entry] = WeakKeyDictionary()

    def of(self, sequences: Seq[Sequence]) -> Tensor:
        """`[B, W]`, contiguous: W pages of the longest. It stands until the next call."""
        rows = [self._bring_up(sequence) for sequence in sequences]
        width = max(len(sequence.pages) for sequence in sequences)
        size = len(rows) * width
        if size > len(self._batch):
            self._batch = torch.empty(size * 3 // 2, dtype=torch.int64)
        out = self._batch[:size].view(len(rows), width)
        return torch.index_select(self._table[:, :width], 0, torch.tensor(rows), out=out)

    def _bring_up(self, sequence: Sequence) -> int:
        entry = self._entries.get(sequence)
        if entry is None or entry.stay != sequence.num_preempted:
            entry = self._enter(sequence, entry)
        num_pages = len(sequence.pages)
        if num_pages > entry.num_written:
            if num_pages > self._table.shape[1]:
                self._grow(len(self._table), num_pages * 3 // 2)
            self._array[entry.row, entry.num_written : num_pages] = sequence.pages[entry.num_written :]
            entry.num_written = num_pages
        return entry.row

    def _enter(self, sequence: Sequence, before: _Entry | None) -> _Entry:
        if before is None:
            taken = {entry.row for entry in self._entries.values()}
            row = next(row for row in range(len(taken) + 1) if row not in taken)
            if row >= len(self._table):
                self._grow((row + 1) * 3 // 2, self._table.shape[1])
        else:
            row = before.row
        self._array[row] = 0
        entry = self._entries[sequence] = _Entry(row, sequence.num_preempted)
        return entry

    def _grow(self, num_rows: int, width: int) -> None:
        grown = torch.zeros(num_rows, width, dtype=torch.int64)
        grown[: self._table.shape[0], : self._table.shape[1]] = self._table
        self._table, self._array = grown, grown.numpy()

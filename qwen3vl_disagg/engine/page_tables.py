"""Page ids of running sequences as a tensor. What a step writes is what is new, whatever the length of the contexts."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from weakref import ref

import torch
from torch import Tensor

from qwen3vl_disagg.core.tensors import lazy_zeros
from qwen3vl_disagg.engine.sequence import Sequence


class PageTables:
    """`table [R, W]` int64 on the host: row b is that of a batch's sequence b, zeros behind its pages.

    Only new pages are written, and all of a sequence that has come, or come back, since the batch before.
    """

    def __init__(self, max_rows: int, num_pages: int) -> None:
        self.table = lazy_zeros((max_rows, num_pages), torch.int64)
        self._array = self.table.numpy()  # the same memory: writing a few numbers costs a tenth
        self._rows: list[tuple[Callable[[], Sequence | None], int, int]] = []
        """Of each: whose it is, how often that had been preempted, and how many of its pages are written."""

    def fill(self, sequences: Seq[Sequence]) -> None:
        """Row b becomes that of `sequences[b]`; the others stay."""
        self._rows += [(_nobody, 0, 0)] * (len(sequences) - len(self._rows))
        for b, sequence in enumerate(sequences):
            whose, stay, num_written = self._rows[b]
            pages = sequence.pages
            if whose() is not sequence or stay != sequence.num_preempted:
                before, num_written = num_written, self._bring(sequence, b)
                self._array[b, num_written:before] = 0
                whose = ref(sequence)
            elif num_written == len(pages):
                continue
            self._array[b, num_written : len(pages)] = pages[num_written:]
            self._rows[b] = (whose, sequence.num_preempted, len(pages))

    def _bring(self, sequence: Sequence, b: int) -> int:
        """What is written of it further down, to row b: who ends moves those behind it up. How many pages that are."""
        for row in range(b + 1, len(self._rows)):
            whose, stay, num_written = self._rows[row]
            if whose() is sequence and stay == sequence.num_preempted:
                self._array[b, :num_written] = self._array[row, :num_written]
                return num_written
        return 0

    def of(self, sequences: Seq[Sequence]) -> Tensor:
        """`[B, W]` with W pages of the longest. It stands until the next call."""
        self.fill(sequences)
        return self.table[: len(sequences), : max(len(sequence.pages) for sequence in sequences)]


def _nobody() -> None:
    return None

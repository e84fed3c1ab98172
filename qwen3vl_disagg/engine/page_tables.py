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

    A row is written where it was another sequence's in the batch before, or the sequence has come back since, else only
    its new pages are.
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
                self._array[b, len(pages) : num_written] = 0
                whose, num_written = ref(sequence), 0
            elif num_written == len(pages):
                continue
            self._array[b, num_written : len(pages)] = pages[num_written:]
            self._rows[b] = (whose, sequence.num_preempted, len(pages))

    def of(self, sequences: Seq[Sequence]) -> Tensor:
        """`[B, W]` with W pages of the longest. It stands until the next call."""
        self.fill(sequences)
        return self.table[: len(sequences), : max(len(sequence.pages) for sequence in sequences)]


def _nobody() -> None:
    return None

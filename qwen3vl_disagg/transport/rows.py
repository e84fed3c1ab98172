"""Visual rows of an item as the engine reads them: straight from the blocks (or the sender's tensors) they lie in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qwen3vl_disagg.core.requests import ItemTimings

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

    def write(self, start: int, stop: int, main_out: Tensor, deepstack_out: Tensor | None) -> None:
        """Copy rows [start, stop) into `[stop - start, h]` and `[stop - start, n * h]`.

        ValueError if not all of them are here. `deepstack_out` is None for a model without levels.
        """
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
    """Rows of an item that are here now, and what it took: the encoder's times, the payloads' time and bytes so far."""

    request_id: str
    item: int
    attempt: int
    rows: VisualRows
    encode_rank: int
    preprocess_ms: float
    encode_ms: float
    transfer_ms: float
    transfer_bytes: int
    resumes: int
    cached: bool = False
    batch: int = 0
    note: str = ""

    def timings(self) -> ItemTimings:
        return ItemTimings(
            preprocess=self.preprocess_ms,
            encode=self.encode_ms,
            transfer=self.transfer_ms,
            transfer_bytes=self.transfer_bytes,
            encode_rank=self.encode_rank,
            rows=self.rows.stop,
            resumes=self.resumes,
            attempts=self.attempt,
            cached=self.cached,
            batch=self.batch,
            note=self.note,
        )

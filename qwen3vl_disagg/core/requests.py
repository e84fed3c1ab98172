"""Request types shared by the rooms above: plain, immutable, msgspec-encodable values."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Literal

import msgspec

from qwen3vl_disagg.core.sampling_params import SamplingParams

__all__ = ["FinishReason", "ItemTimings", "RequestTimings", "SamplingParams", "TokenLogprob", "VisualItem"]

FinishReason = Literal["stop", "length"]


class VisualItem(msgspec.Struct, frozen=True, kw_only=True):
    """One image or video of a prompt, known from its header alone.

    `grid` is (t, h, w) in patches, `num_rows = t * h * w / merge**2` the rows it fills in the prompt, `offset` the
    index of its first placeholder token, `digest` the SHA-256 (hex) of its bytes, `param` where it stood in the
    caller's messages.

    A video's rows stand in t runs of equal length with text (timestamps) between them: with two frames of 4 rows,
    run_offsets (5, 14) and so stop 18, row 3 has token 8, row 4 token 14, and 4 rows stand before token 12.
    """

    modality: Literal["image", "video"]
    digest: str
    num_bytes: int
    grid: tuple[int, int, int]
    num_rows: int
    offset: int
    param: str
    run_offsets: tuple[int, ...] = ()
    """Of a video: the index of each run's first placeholder; the first is `offset`."""
    frames: tuple[int, ...] = ()
    """Of a video: which of its frames are looked at, from 0, in their order."""
    is_frame_list: bool = False
    """The bytes are a list of images, not a file."""
    size: tuple[int, int] | None = None
    """(height, width) of the image, or of each frame, as the header says, from which `grid` follows."""
    salt: str = ""
    """Whose it is: what one has sent is in no cache for another."""

    @property
    def content(self) -> tuple[str, str, tuple[int, int, int], tuple[int, ...], bool, str]:
        """All of what the item's rows depend on that is the request's own, and whose they are."""
        frames, height, width = self.grid
        return self.modality, self.digest, (frames, height, width), tuple(self.frames), self.is_frame_list, self.salt

    @property
    def runs(self) -> tuple[int, ...]:
        """The index of each run's first placeholder; an image has one run."""
        return self.run_offsets or (self.offset,)

    @property
    def run_rows(self) -> int:
        return self.num_rows // len(self.runs)

    @property
    def stop(self) -> int:
        """The index after the last placeholder."""
        return self.runs[-1] + self.run_rows

    def token_of(self, row: int) -> int:
        """The index of a row's placeholder; `stop` for the row after the last."""
        run, rest = divmod(row, self.run_rows)
        return self.stop if row == self.num_rows else self.runs[run] + rest

    def rows_before(self, index: int) -> int:
        """Rows whose placeholders stand before a token of the prompt, or after all of it."""
        run = max(0, bisect_right(self.runs, index) - 1)
        return run * self.run_rows + min(max(0, index - self.runs[run]), self.run_rows)

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Rows [start, stop) by run: (first row, row after the last, the first one's token)."""
        while start < stop:
            end = min(stop, (start // self.run_rows + 1) * self.run_rows)
            yield start, end, self.token_of(start)
            start = end


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log probability (natural, raw distribution) of a sampled token and of the most likely ones."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class ItemTimings(msgspec.Struct, kw_only=True):
    """Wall milliseconds of one item's stages. `queue`: what it waited for on its encode rank."""

    queue: float = 0.0
    preprocess: float = 0.0
    encode: float = 0.0
    """That of the whole batch."""
    transfer: float = 0.0
    transfer_bytes: int = 0
    encode_rank: int = -1
    rows: int = 0
    resumes: int = 0
    attempts: int = 1
    cached: bool = False
    """The encode rank had the rows already: `preprocess` and `encode` are 0."""
    batch: int = 0
    """Which run of the encode rank's tower the item was in, from 1. Items of one run share its time."""
    note: str = ""
    """What of its file is missing or was skipped, if anything: the answer is about the rest."""


class RequestTimings(msgspec.Struct, kw_only=True):
    """Wall milliseconds per stage of one request, plus what travelled and where. The names are the HTTP surface's."""

    queue: float = 0.0
    preprocess: float = 0.0
    encode: float = 0.0
    transfer: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    transfer_bytes: int = 0
    encode_ranks: list[int] = msgspec.field(default_factory=list)
    language_rank: int = 0
    resumes: int = 0
    cached_tokens: int = 0
    items: list[ItemTimings] = msgspec.field(default_factory=list)

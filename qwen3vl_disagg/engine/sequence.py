"""One request inside the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen3vl_disagg.core.requests import FinishReason, ItemTimings, RequestTimings, SamplingParams, VisualItem
from qwen3vl_disagg.disagg.rows import VisualRows


@dataclass
class Sequence:
    """Prompt, what has been generated, and where its keys and values lie.

    `positions` is `[3, prompt]` int64; the token at index i after the prompt has position i + `delta` on every axis.
    """

    request_id: str
    token_ids: list[int]
    items: list[VisualItem]
    sampling: SamplingParams
    positions: Tensor
    delta: int
    generator: torch.Generator
    arrival: float = field(default_factory=time.monotonic)
    generated: list[int] = field(default_factory=list)
    rows: dict[int, VisualRows] = field(default_factory=dict)
    """Item -> its rows that are here now; the rows before them have been consumed."""
    restarted: set[int] = field(default_factory=set)
    """Items whose next rows must begin with row 0."""
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    """Tokens whose keys and values are in pages."""
    finish_reason: FinishReason | None = None
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    prefill_s: float = 0.0
    """Wall time of the steps that prefilled this sequence."""
    item_timings: dict[int, ItemTimings] = field(default_factory=dict)

    @property
    def num_prompt(self) -> int:
        return len(self.token_ids)

    @property
    def max_tokens(self) -> int:
        """Tokens that can ever need a key and a value (the last one sampled never does)."""
        return self.num_prompt + self.sampling.max_new_tokens - 1

    @property
    def is_prefilled(self) -> bool:
        return self.num_cached >= self.num_prompt

    @property
    def limit(self) -> tuple[int, int | None]:
        """(tokens of the prompt that prefill can go up to, the item that is in the way)."""
        for index, item in enumerate(self.items):
            if self.num_cached >= item.offset + item.num_rows:
                continue
            rows = self.rows.get(index)
            if rows is None:
                return item.offset, index
            if rows.stop < item.num_rows:
                return item.offset + rows.stop, index
        return self.num_prompt, None

    @property
    def reach(self) -> int:
        """Tokens of the prompt that prefill can go up to."""
        return self.limit[0]

    def restart(self, index: int) -> list[int]:
        """Go back to an item's first row; the items whose rows are gone with that, this one first.

        Rows in the cache after it are gone too: those of later items are no longer held by anybody.
        """
        later = range(index + 1, len(self.items))
        gone = [index, *(other for other in later if self.items[other].offset < self.num_cached)]
        for other in gone:
            self.rows.pop(other, None)
        self.restarted.update(gone)
        self.num_cached = min(self.num_cached, self.items[index].offset)
        return gone

    def touched(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Items with rows among the prompt's tokens [start, stop): (index, first row, row after the last).

        An item of 10 rows at offset 5 in the chunk [8, 30) is (index, 3, 10).
        """
        found = []
        for index, item in enumerate(self.items):
            low, high = max(start, item.offset), min(stop, item.offset + item.num_rows)
            if low < high:
                found.append((index, low - item.offset, high - item.offset))
        return found

    def timings(self, now: float, language_rank: int) -> RequestTimings:
        """Stage times in ms. Items of one encode rank run one after another, those of several ranks side by side:
        a stage's time is the largest sum over a rank."""
        items = [self.item_timings[i] for i in sorted(self.item_timings)]
        ranks = sorted({item.encode_rank for item in items})

        def stage(name: str) -> float:
            sums = [sum(getattr(item, name) for item in items if item.encode_rank == rank) for rank in ranks]
            return max(sums, default=0.0)

        return RequestTimings(
            queue=(self.admitted_at - self.arrival) * 1e3,
            preprocess=stage("preprocess"),
            encode=stage("encode"),
            transfer=stage("transfer"),
            prefill=self.prefill_s * 1e3,
            decode=(now - self.first_token_at) * 1e3,
            transfer_bytes=sum(item.transfer_bytes for item in items),
            encode_ranks=ranks,
            language_rank=language_rank,
            resumes=sum(item.resumes for item in items),
            items=items,
        )

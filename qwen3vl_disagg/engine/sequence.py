"""One request inside the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen3vl_disagg.core.requests import FinishReason, ItemTimings, RequestTimings, SamplingParams, VisualItem


@dataclass(frozen=True)
class ItemRows:
    """The visual rows of one item: main `[rows, h]`, deepstack `[rows, n * h]`."""

    main: Tensor
    deepstack: Tensor


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
    rows: dict[int, ItemRows] = field(default_factory=dict)
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    """Tokens whose keys and values are in pages."""
    finish_reason: FinishReason | None = None
    admitted_at: float = 0.0
    items_at: float = 0.0
    first_token_at: float = 0.0
    item_timings: dict[int, ItemTimings] = field(default_factory=dict)

    @property
    def num_prompt(self) -> int:
        return len(self.token_ids)

    @property
    def max_tokens(self) -> int:
        """Tokens that can ever need a key and a value (the last one sampled never does)."""
        return self.num_prompt + self.sampling.max_new_tokens - 1

    @property
    def has_all_items(self) -> bool:
        return len(self.rows) == len(self.items)

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
            prefill=(self.first_token_at - self.items_at) * 1e3,
            decode=(now - self.first_token_at) * 1e3,
            transfer_bytes=sum(item.transfer_bytes for item in items),
            encode_ranks=ranks,
            language_rank=language_rank,
            resumes=sum(item.resumes for item in items),
            items=items,
        )

"""One answer of a request inside the engine, and what the answers to one prompt share."""

from __future__ import annotations

import time
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.requests import FinishReason, ItemTimings, RequestTimings, SamplingParams, VisualItem
from qwen3vl_disagg.engine.grammars import AnswerMasks
from qwen3vl_disagg.engine.pages import ROOT, PageContent, Prefix
from qwen3vl_disagg.engine.sampling import SamplingRow
from qwen3vl_disagg.transport.buffers import VisualRows


@dataclass(eq=False)
class Samples:
    """The answers to one request's prompt, which one of them computes while the others wait.

    Whoever comes in when the prompt is whole shares its full pages, copies what the last page has of it, and picks its
    first token from the logits that are kept here: nothing of the prompt is computed again, no visual row needed again.
    """

    members: list[Sequence] = field(default_factory=list)
    """That have not ended, and of these"""
    admitted: list[Sequence] = field(default_factory=list)
    """those that have pages. While the prompt is not whole, there is one at most."""
    stem: list[int] = field(default_factory=list)
    """Pages of the prompt, held for members that wait when no admitted one has them."""
    first: Sequence | None = None
    """Who has computed the prompt, and"""
    logits_V: Tensor | None = None
    """what came of it, until every member has a token."""

    @property
    def is_computing(self) -> bool:
        """One is at the prompt, for all others."""
        return bool(self.admitted) and not self.admitted[0].has_prompt

    @property
    def pages(self) -> list[int]:
        """Those that begin with the whole prompt; none while it is not whole."""
        return self.stem if not self.admitted or self.is_computing else self.admitted[0].pages

    def keep(self, first: Sequence, logits_V: Tensor) -> None:
        """The prompt is whole, and this is what follows it."""
        if not first.generated and any(s is not first and not s.generated for s in self.members):
            self.first, self.logits_V = first, logits_V.clone()  # of all that the step gave it was a view

    def share(self, sequence: Sequence) -> Tensor:
        """The logits that follow the prompt; its times become those of `sequence`, too."""
        if self.first is None or self.logits_V is None:
            raise RuntimeError(f"what follows the prompt of {sequence.name} is not known")
        sequence.prefill_s, sequence.cached_tokens = self.first.prefill_s, self.first.cached_tokens
        return self.logits_V

    def begun(self) -> None:
        """One more has its first token."""
        if self.logits_V is not None and all(member.generated for member in self.members):
            self.first = self.logits_V = None


@dataclass(eq=False)
class Sequence:
    """Prompt, what has been generated, and where its keys and values lie.

    `positions` is `[3, prompt]` int64; the token at index i after the prompt has position i + `delta` on every axis.
    """

    request_id: str
    token_ids: list[int]
    """The prompt."""
    items: list[VisualItem]
    """In the order of the prompt."""
    sampling: SamplingParams
    positions: Tensor
    delta: int
    seed: int
    sample: int = 0
    """Which of the request's answers."""
    samples: Samples = field(default_factory=Samples)
    arrival: float = field(default_factory=time.monotonic)
    order: int = 0
    """Number of its arrival at the scheduler."""
    due: float = FIRST_COME
    """When its first token is due (`core/due.py`), on any clock."""
    generated: list[int] = field(default_factory=list)
    rows: dict[int, VisualRows] = field(default_factory=dict)
    """Item -> its rows that are here now; the rows before them have been consumed."""
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    """Tokens whose keys and values are in pages."""
    copied: tuple[int, int] | None = None
    """A page of another answer whose first so many tokens begin this one's first page that is not shared."""
    num_scored: int = 1
    """Tokens of the prompt whose log probabilities have been told, where they are wanted; the first has none."""
    num_found: int = 0
    """Of these, tokens that were there when the sequence was admitted, in pages that others may read too."""
    node: int | None = ROOT
    """What the page pool calls the last page that it remembers of this sequence; None when it remembers no more."""
    num_remembered: int = 0
    finish_reason: FinishReason | None = None
    num_preempted: int = 0
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    prefill_s: float = 0.0
    """Wall time of the steps that prefilled this sequence."""
    item_timings: dict[int, ItemTimings] = field(default_factory=dict)
    cached_tokens: int = 0
    """`num_found` at the first admission."""
    masks: AnswerMasks | None = None
    """Of a request with a grammar. They know what was generated, and stay when it gives up its pages."""
    prefix: Prefix = field(default_factory=Prefix)
    """Pages that hold its beginning, as last looked up."""
    _contents: list[PageContent] = field(default_factory=list)

    @cached_property
    def sampling_row(self) -> SamplingRow:
        """What the sampler needs; it sees `generated` grow."""
        return SamplingRow(self.sampling, self.seed, self.token_ids, self.generated, self.samples)

    @property
    def name(self) -> str:
        """Among all sequences."""
        return f"{self.request_id}/{self.sample}" if self.sample else self.request_id

    @property
    def urgency(self) -> tuple[float, int]:
        """The least comes in, and is prefilled, first."""
        return self.due, self.order

    @property
    def has_prompt(self) -> bool:
        """All of its prompt is in its pages."""
        return self.num_cached >= self.num_prompt

    @property
    def can_begin(self) -> bool:
        """Its first token can be picked from what is known of its prompt."""
        if self.generated or not self.has_prompt or self.samples.logits_V is None:
            return False
        return self.masks is None or not self.masks.is_late

    @property
    def num_prompt(self) -> int:
        return len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and what has been generated."""
        return len(self.token_ids) + len(self.generated)

    @property
    def max_tokens(self) -> int:
        """Tokens that can ever need a key and a value (the last one sampled never does)."""
        return self.num_prompt + self.sampling.max_new_tokens - 1

    @property
    def lacks_scores(self) -> bool:
        """Log probabilities of the prompt are wanted, and not all of them told: it takes no pages from the cache."""
        return self.sampling.prompt_logprobs is not None and self.num_scored < self.num_prompt

    @property
    def is_decoding(self) -> bool:
        """All but the last generated token is in the cache."""
        return bool(self.generated) and self.num_cached == self.num_tokens - 1

    @property
    def goes_on(self) -> bool:
        """Its next token need not be its last."""
        return len(self.generated) + 1 < self.sampling.max_new_tokens

    @property
    def can_decode(self) -> bool:
        """Its next token can be computed, and picked."""
        return self.is_decoding and not (self.masks is not None and self.masks.is_late)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and output."""
        num_prompt = len(self.token_ids)
        return self.token_ids[start:stop] + self.generated[max(0, start - num_prompt) : max(0, stop - num_prompt)]

    def positions_of(self, start: int, stop: int) -> Tensor:
        """`[3, stop - start]`"""
        behind = torch.arange(max(start, self.num_prompt), max(stop, self.num_prompt)) + self.delta
        return torch.cat([self.positions[:, start:stop], behind.expand(3, -1)], dim=1)

    @cached_property
    def _stops(self) -> list[int]:
        return [item.stop for item in self.items]

    def _items_behind(self, token: int) -> range:
        """Items that end after that many tokens; those before are not looked at."""
        return range(bisect_right(self._stops, token), len(self.items))

    @property
    def first_partial(self) -> int:
        """Where the first item begins that is not all in the cache; all tokens when there is none."""
        behind = self._items_behind(self.num_cached)
        return self.items[behind.start].offset if behind else self.num_tokens

    @property
    def limit(self) -> tuple[int, int | None]:
        """(tokens that prefill can go up to, the item that is in the way)."""
        for index in self._items_behind(self.num_cached):
            item, rows = self.items[index], self.rows.get(index)
            num_here = item.rows_before(self.num_cached) if rows is None else rows.stop
            if num_here < item.num_rows:
                return item.token_of(num_here), index
        return self.num_tokens, None

    @property
    def reach(self) -> int:
        """Tokens that prefill can go up to."""
        return self.limit[0]

    def first_row(self, index: int) -> int:
        """The first row of an item that is needed, given what was found in the cache; num_rows when none is.

        An item of 10 rows at offset 5 needs its rows from 3 on when 8 tokens were found.
        """
        return self.items[index].rows_before(self.num_found)

    def restart(self, index: int) -> None:
        """Go back to the first needed row of an item that is not all in the cache."""
        self.rows.pop(index, None)
        self.num_cached = min(self.num_cached, self.items[index].token_of(self.first_row(index)))

    def leave(self) -> None:
        """Nothing of it is in the cache any more."""
        self.pages, self.num_cached, self.num_found = [], 0, 0
        self.node, self.num_remembered = ROOT, 0
        self.__dict__.pop("sampling_row", None)  # and with it what the sampler keeps of it
        self.rows.clear()

    def touched(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Items with rows among the prompt's tokens [start, stop): (index, first row, row after the last).

        An item of 10 rows at offset 5 in the chunk [8, 30) is (index, 3, 10).
        """
        found = []
        for index in self._items_behind(start):
            item = self.items[index]
            if item.offset >= stop:
                break
            low, high = item.rows_before(start), item.rows_before(stop)
            if low < high:
                found.append((index, low, high))
        return found

    def page_contents(self, page_size: int, stop: int) -> list[PageContent]:
        """What its first pages hold, at least `stop` of them, all of these full: token ids, and of each item with rows
        there its address and the first of these rows.

        Positions need not be named: they follow from tokens and grids up to there.
        """
        for start in range(len(self._contents) * page_size, stop * page_size, page_size):
            visual = tuple((*self.items[i].content, low) for i, low, _ in self.touched(start, start + page_size))
            # A page is found behind the one before it, so a salt in the first is in all of them.
            salt = self.sampling.cache_salt if start == 0 else ""
            self._contents.append((tuple(self.tokens(start, start + page_size)), visual, salt))
        return self._contents

    def timings(self, now: float, language_rank: int) -> RequestTimings:
        """Stage times in ms. Items of one encode rank run one after another, those of several ranks side by side:
        a stage's time is the largest sum over a rank. Items that were encoded together share the time of their batch.
        """
        items = [self.item_timings.get(i, ItemTimings(rows=item.num_rows)) for i, item in enumerate(self.items)]
        ranks = sorted({item.encode_rank for item in items} - {-1})

        def stage(name: str) -> float:
            sums = [sum(getattr(item, name) for item in items if item.encode_rank == rank) for rank in ranks]
            return max(sums, default=0.0)

        batches = {(item.encode_rank, item.batch or -i): item.encode for i, item in enumerate(items, 1)}
        encode = [sum(ms for (rank, _), ms in batches.items() if rank == of) for of in ranks]

        return RequestTimings(
            queue=(self.admitted_at - self.arrival) * 1e3,
            preprocess=stage("preprocess"),
            encode=max(encode, default=0.0),
            transfer=stage("transfer"),
            prefill=self.prefill_s * 1e3,
            decode=(now - self.first_token_at) * 1e3,
            transfer_bytes=sum(item.transfer_bytes for item in items),
            encode_ranks=ranks,
            language_rank=language_rank,
            resumes=sum(item.resumes for item in items),
            cached_tokens=self.cached_tokens,
            items=items,
        )

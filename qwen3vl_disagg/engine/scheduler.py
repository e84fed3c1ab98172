"""Who runs in the next step. Pure: sequences, page ids and counts; no tensors, clock or thread.

Requests are admitted as they are due (`core/due.py`), each with pages for the whole prompt, so prefill may start before
all its items are there. Prefill goes as far as the rows that are here allow, in chunks under a token budget, those that
are due first before others; then the request is decoded with all others, a page at a time. When pages run out, the one
that arrived last gives its pages back and waits in its place to be admitted again: what it had is computed anew, its
visual rows are asked for again. Of those that are in, the one that arrived first is never stopped, so every request
ends.

What full pages hold is remembered, and a prompt that begins the same way starts behind them.

The answers to one prompt (`Samples`) are sequences that come in one by one. The first computes the prompt; while it is
at it the others are passed over, and then each shares its pages, also where nothing is remembered. When no admitted one
has them any more, they are held for those that wait, until somebody who runs needs a page.
"""

from __future__ import annotations

import math
from bisect import insort
from dataclasses import dataclass, field, replace

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.settings import EngineSettings, GapTarget
from qwen3vl_disagg.engine.pages import PagePool, Prefix
from qwen3vl_disagg.engine.sequence import Samples, Sequence
from qwen3vl_disagg.parallel.lockstep import StepPlan

MAX_CROWD = 8
"""Times a chunk at most, where so many more prompts wait than are answered."""


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) of a sequence's prompt, or of what is computed again after a preemption."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Ends what is known, so its last token's logits give the next token."""
        return self.stop == self.sequence.num_tokens


@dataclass(frozen=True)
class Step:
    """What to run now: chunks to prefill, or sequences to decode one token of; never both."""

    prefill: list[Chunk] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """What a sequence that comes in gets: pages that are there, and new ones. `num_found`: tokens it has then."""

    shared: list[int]
    num_found: int
    node: int | None
    num_new: int = 0
    copied: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits(EngineSettings):
    """What decides about a step. While requests are being decoded, prefill goes in chunks of `chunk_tokens` together,
    one between two decode steps: that bounds the time between their tokens."""

    chunk_tokens: int = 512
    gap_target_ms: GapTarget | None = None
    """What the time between two tokens should be while prompts are prefilled: chunks grow and shrink from
    `chunk_tokens` on. None: they do not."""
    overlap: bool = True
    """Prefill the items that are here while later ones are still on their way."""
    min_overlap_tokens: int = 256
    """But not for fewer tokens than this, unless somebody waits for the room they take."""

    def __post_init__(self) -> None:
        if min(self.max_running, self.max_prefill_tokens, self.chunk_tokens) < 1:
            raise ValueError(f"all limits must be at least 1: {self}")


class Scheduler:
    """`add` requests, then again and again: `admit`, `schedule`, and run the step (which moves `num_cached` on and
    appends to `generated`), `remember` what is in the cache. `remove` at any time."""

    def __init__(self, pool: PagePool, limits: SchedulerLimits | None = None) -> None:
        self.pool, self.limits = pool, limits or SchedulerLimits()
        self.chunk_tokens = self.limits.chunk_tokens
        """Of prompts in a step while others are decoded; may be set from outside."""
        self.is_short_of_room = False
        """Set from outside: rows wait for the blocks of those that are here, which should be used up now."""
        self.waiting: list[Sequence] = []
        """The most urgent first."""
        self.admitted: dict[str, Sequence] = {}
        """In order of arrival: who gives way to somebody who needs a page has then not been passed in the same step."""
        self.samples: dict[str, Samples] = {}
        """Request -> its answers."""
        self.num_preempted = 0
        self.num_prefills = 0
        """Steps."""
        self._num_arrived = 0
        self._prefilled_last = False

    def add(self, sequence: Sequence) -> None:
        """Queue a request. InputError as `check` has it."""
        self.check(sequence)
        self._num_arrived += 1
        sequence.order = self._num_arrived
        sequence.samples.members.append(sequence)
        self.samples[sequence.request_id] = sequence.samples
        insort(self.waiting, sequence, key=lambda s: s.urgency)

    def check(self, sequence: Sequence) -> None:
        """InputError if the whole pool would be too small for a request."""
        room = self.pool.num_pages * self.pool.page_size
        if self.pool.pages_for(sequence.max_tokens) > self.pool.num_pages:
            raise InputError(
                f"prompt of {sequence.num_prompt} tokens with {sequence.sampling.max_new_tokens} new ones needs "
                f"{sequence.max_tokens} tokens of keys and values; there is room for {room} (--kv-cache-gib)",
                param="messages",
            )

    @property
    def has_step(self) -> bool:
        """Whether `admit` or `schedule` could do something now."""
        if self._next() is not None:
            return True
        return any(s.can_decode or s.can_begin or self._chunk_end(s) for s in self.admitted.values())

    # ---- admission ----

    def admit(self) -> list[Sequence]:
        """Move requests from the queue in, the most urgent first, as far as there is room. What they copy comes
        before anything else is written, in their order."""
        new = []
        while (entry := self._next()) is not None:
            sequence, place = entry
            samples = sequence.samples
            self.waiting.remove(sequence)
            sequence.pages = self.pool.allocate(place.num_new, place.shared) or []
            sequence.num_found = sequence.num_cached = place.num_found
            sequence.copied = place.copied
            sequence.node, sequence.num_remembered = place.node, len(place.shared)
            sequence.cached_tokens = sequence.cached_tokens if sequence.num_preempted else sequence.num_found
            self.admitted[sequence.name] = sequence
            samples.admitted.append(sequence)
            self._drop(samples)
            new.append(sequence)
        if new:
            self.admitted = {s.name: s for s in sorted(self.admitted.values(), key=lambda s: s.order)}
        return new

    def _next(self) -> tuple[Sequence, _Place] | None:
        """The first in the queue that waits for nobody else to compute its prompt, if it can come in now. Where nobody
        is in, the prompts that are held go, the last to arrive first, until it can."""
        if len(self.admitted) >= self.limits.max_running:
            return None
        sequence = next((s for s in self.waiting if not s.samples.is_computing), None)
        if sequence is None:
            return None
        while (place := self._place(sequence)) is None and not self.admitted and self._drop_last():
            continue
        return None if place is None else (sequence, place)

    def _place(self, sequence: Sequence) -> _Place | None:
        pool, size = self.pool, self.pool.page_size
        # The last token has to be computed in any case, for its logits; but not where these are kept.
        found, is_known = sequence.prefix, bool(sequence.samples.pages)
        stop = max((sequence.num_tokens - 1) // size, sequence.num_prompt // size if is_known else 0)
        if pool.keep and not sequence.lacks_scores:
            pool.find(sequence.page_contents(size, stop), stop, found)
        found.shorten(stop)
        place = _Place(found.pages, len(found.pages) * size, found.node)
        if is_known and place.num_found < sequence.num_prompt:
            place = self._beside(sequence, found)
        count = pool.pages_for(sequence.num_tokens) - len(place.shared)
        # Those that are in may each want a page soon: who comes in now should not be the next to go.
        spare = sum(1 for s in self.admitted.values() if s.num_tokens < s.max_tokens)
        if sequence.num_preempted and pool.pages_for(sequence.max_tokens) > pool.pages_for(sequence.num_tokens):
            spare += 1  # nor should it go again before it has gained a page of tokens
        if count + spare > pool.num_free:
            return None
        kept = sum(1 for page in place.shared if pool.is_kept(page))
        return replace(place, num_new=count) if count + spare + kept <= pool.num_free else None

    def _beside(self, sequence: Sequence, found: Prefix) -> _Place:
        """Behind a prompt of 37 tokens that another answer has on pages of 16: two pages shared, 5 tokens copied."""
        num_full, rest = divmod(sequence.num_prompt, self.pool.page_size)
        pages = sequence.samples.pages
        shared = found.pages + pages[len(found.pages) : num_full]
        node = found.node if len(found.pages) == num_full else None  # what follows a page that is not known cannot be
        return _Place(shared, sequence.num_prompt, node, copied=(pages[num_full], rest) if rest else None)

    def _drop_last(self) -> bool:
        """Let go of a prompt that is held for answers that wait: one of them will compute it again."""
        held = [samples for samples in self.samples.values() if samples.stem]
        if held:
            self._drop(max(held, key=lambda samples: samples.members[0].order))
        return bool(held)

    def _drop(self, samples: Samples) -> None:
        self.pool.free(samples.stem)
        samples.stem = []

    # ---- steps ----

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of prompts that would be run now, at most."""
        return sum(chunk.stop - chunk.start for chunk in self._chunks(self.limits.max_prefill_tokens))

    @property
    def num_decoding(self) -> int:
        return sum(1 for s in self.admitted.values() if s.can_decode)

    @property
    def owes_decode(self) -> bool:
        return self._prefilled_last and self.num_decoding > 0

    def schedule(self, plan: StepPlan | None = None) -> tuple[Step | None, list[Sequence]]:
        """The next step (None when nothing can run now), and the sequences that had to give their pages up for it.

        Whether it is the turn of prompts, and how much of them, is decided here or given by `plan`.
        """
        preempted: list[Sequence] = []
        budget = self._prefill_budget() if plan is None else min(plan.prefill, plan.num_rows)
        if budget:
            chunks = self._chunks(budget)
            if chunks:
                self._prefilled_last = True
                self.num_prefills += 1
                return Step(prefill=chunks), preempted
        self._prefilled_last = False
        running: list[Sequence] = []
        for sequence in list(self.admitted.values()):
            if plan is not None and len(running) == plan.num_rows:
                break
            if sequence.name in self.admitted and sequence.can_decode and self._grow(sequence, preempted):
                running.append(sequence)
        return (Step(decode=running) if running else None), preempted

    def _prefill_budget(self) -> int:
        if self.owes_decode or all(sequence.is_decoding for sequence in self.admitted.values()):
            return 0
        return self._gap_tokens if self.num_decoding else self.limits.max_prefill_tokens

    @property
    def _gap_tokens(self) -> int:
        """Of prompts between two tokens of others: more than a chunk where more wait for their first token than for the
        next one, unless the gap was asked for."""
        if self.limits.gap_target_ms != "auto":
            return self.chunk_tokens
        num_waiting = sum(1 for sequence in self.admitted.values() if self._chunk_end(sequence))
        crowd = min(max(num_waiting // max(self.num_decoding, 1), 1), MAX_CROWD)
        return min(self.chunk_tokens * crowd, self.limits.max_prefill_tokens)

    def _chunks(self, budget: int) -> list[Chunk]:
        """For the most urgent first. Where one gets its first token, and will be decoded, those that are due later make
        the step no longer than one between the tokens of others."""
        chunks: list[Chunk] = []
        first, used, short = math.inf, 0, min(budget, self._gap_tokens)
        for sequence in sorted(self.admitted.values(), key=lambda s: s.urgency):
            most = budget if sequence.due <= first else short
            stop = min(self._chunk_end(sequence), sequence.num_cached + most - used)
            if stop > sequence.num_cached:
                chunks.append(Chunk(sequence, sequence.num_cached, stop))
                used += stop - sequence.num_cached
                if chunks[-1].is_last and sequence.sampling.pooling is None and sequence.sampling.max_new_tokens > 1:
                    first = min(first, sequence.due)
        return chunks

    def _chunk_end(self, sequence: Sequence) -> int:
        """How far prefill should go on now; 0: it should wait."""
        if sequence.is_decoding:
            return 0
        reach, missing = sequence.limit
        if reach <= sequence.num_cached:
            return 0
        # Rows of the item in the way have to be used before the rest of it can come.
        has_rows = any(sequence.items[index].offset < reach for index in sequence.rows)
        must = missing is None or missing in sequence.rows or (self.is_short_of_room and has_rows)
        may = self.limits.overlap and reach - sequence.num_cached >= self.limits.min_overlap_tokens
        return reach if must or may else 0

    def _grow(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """A page for the next token, if one is needed; False when the sequence itself was the last to arrive. Prompts
        that are held go first."""
        while len(sequence.pages) * self.pool.page_size < sequence.num_tokens:
            pages = self.pool.allocate(1)
            if pages is not None:
                sequence.pages += pages
                continue
            if self._drop_last():
                continue
            last = max(self.admitted.values(), key=lambda s: s.order)
            self._preempt(last)
            preempted.append(last)
            if last is sequence:
                return False
        return True

    def are_all_that_run(self, batch: list[Sequence]) -> bool:
        """Whether nobody else of those that are in could do something now."""
        others = set(self.admitted.values()).difference(batch)
        return not any(s.can_decode or s.can_begin or self._chunk_end(s) for s in others)

    def has_page_ahead(self, sequence: Sequence) -> bool:
        """Whether there is a page for the token after the next one, taken from nobody."""
        if len(sequence.pages) * self.pool.page_size > sequence.num_tokens:
            return True
        pages = self.pool.allocate(1)
        sequence.pages += pages or []
        return pages is not None

    def _preempt(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        sequence.leave()
        sequence.num_preempted += 1
        self.num_preempted += 1
        insort(self.waiting, sequence, key=lambda s: s.urgency)

    def remember(self, sequence: Sequence) -> None:
        """Note what the sequence's full pages hold, up to the first item that is not all in the cache: what was
        computed from a part of an item may have to be forgotten."""
        size = self.pool.page_size
        if not self.pool.keep or sequence.node is None or sequence.num_cached // size <= sequence.num_remembered:
            return
        stop = min(sequence.num_cached, sequence.first_partial) // size
        contents = sequence.page_contents(size, stop)
        for number in range(sequence.num_remembered, stop):
            sequence.node = self.pool.remember(sequence.pages[number], sequence.node, contents[number])
            if sequence.node is None:
                return
            sequence.num_remembered = number + 1

    def _give_back(self, sequence: Sequence) -> None:
        """The pages of an admitted one; those of the prompt are held where others of its answers will need them."""
        samples = sequence.samples
        samples.admitted.remove(sequence)
        if sequence.has_prompt and not samples.admitted and any(s is not sequence for s in samples.members):
            samples.stem = self.pool.allocate(0, sequence.pages[: self.pool.pages_for(sequence.num_prompt)]) or []
        del self.admitted[sequence.name]
        self.pool.free(sequence.pages)
        sequence.pages = []

    def remove(self, request_id: str, sample: int | None = None) -> bool:
        """Take a request, or one of its answers, out, at whatever stage, and free its pages. False if it is not
        here."""
        samples = self.samples.get(request_id, Samples())
        leaving = [s for s in samples.members if sample in (None, s.sample)]
        samples.members = [s for s in samples.members if s not in leaving]
        for sequence in leaving:
            if sequence.name in self.admitted:
                self._give_back(sequence)
            else:
                self.waiting.remove(sequence)
        if leaving and not samples.members:
            self._drop(samples)
            del self.samples[request_id]
        return bool(leaving)

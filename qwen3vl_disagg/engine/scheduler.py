"""Who runs in the next step. Pure: sequences, page ids and counts; no tensors, clock or thread.

A request is admitted, in order of arrival, once pages for its whole life are free (prompt and all new tokens), so a
running request never runs out, and prefill may start before all its items are there. Prefill goes as far as the rows
that are here allow, in chunks under a token budget; then the request is decoded with all others.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.engine.pages import PagePool
from qwen3vl_disagg.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens [start, stop) of a sequence."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Ends the prompt, so its last token's logits give the first new token."""
        return self.stop == self.sequence.num_prompt


@dataclass(frozen=True)
class Step:
    """What to run now: chunks to prefill, or sequences to decode one token of; never both."""

    prefill: list[Chunk] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Admission by pages, prefill by a token budget, prefill and decode in turns when both wait."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_running: int,
        max_prefill_tokens: int,
        overlap: bool = True,
        min_overlap_tokens: int = 256,
    ) -> None:
        self.pool = pool
        self.max_running, self.max_prefill_tokens = max_running, max_prefill_tokens
        self.overlap, self.min_overlap_tokens = overlap, min_overlap_tokens
        self.is_short_of_room = False
        """Set from outside: rows wait for the blocks of those that are here, which should be used up now."""
        self.waiting: deque[Sequence] = deque()
        self.admitted: dict[str, Sequence] = {}
        self._prefilled_last = False

    def add(self, sequence: Sequence) -> None:
        """Queue a request. InputError if the whole pool would be too small for it."""
        room = self.pool.num_pages * self.pool.page_size
        if self.pool.pages_for(sequence.max_tokens) > self.pool.num_pages:
            raise InputError(
                f"prompt of {sequence.num_prompt} tokens with {sequence.sampling.max_new_tokens} new ones needs "
                f"{sequence.max_tokens} tokens of cache; there are {room}",
                param="messages",
            )
        self.waiting.append(sequence)

    @property
    def has_step(self) -> bool:
        """Whether `admit` or `schedule` could do something now."""
        has_place = bool(self.waiting) and len(self.admitted) < self.max_running
        if has_place and self.pool.pages_for(self.waiting[0].max_tokens) <= self.pool.num_free:
            return True
        return any(s.is_prefilled or self._chunk_end(s) for s in self.admitted.values())

    def _chunk_end(self, sequence: Sequence) -> int:
        """How far prefill should go on now; 0: it should wait."""
        if sequence.is_prefilled:
            return 0
        reach, missing = sequence.limit
        if reach <= sequence.num_cached:
            return 0
        # Rows of the item in the way have to be used before the rest of it can come.
        has_rows = any(sequence.items[index].offset < reach for index in sequence.rows)
        must = missing is None or missing in sequence.rows or (self.is_short_of_room and has_rows)
        may = self.overlap and reach - sequence.num_cached >= self.min_overlap_tokens
        return reach if must or may else 0

    def admit(self) -> list[Sequence]:
        """Move requests from the queue in, first come first served, as far as there is room."""
        new = []
        while self.waiting and len(self.admitted) < self.max_running:
            pages = self.pool.allocate(self.waiting[0].max_tokens)
            if pages is None:
                break
            sequence = self.waiting.popleft()
            sequence.pages = pages
            self.admitted[sequence.request_id] = sequence
            new.append(sequence)
        return new

    def schedule(self) -> Step | None:
        """The next step, or None when nothing can run now."""
        running = [s for s in self.admitted.values() if s.is_prefilled]
        chunks: list[Chunk] = []
        if not (running and self._prefilled_last):
            budget = self.max_prefill_tokens
            for sequence in self.admitted.values():
                stop = min(self._chunk_end(sequence), sequence.num_cached + budget)
                if stop > sequence.num_cached:
                    chunks.append(Chunk(sequence, sequence.num_cached, stop))
                    budget -= stop - sequence.num_cached
        if chunks:
            self._prefilled_last = True
            return Step(prefill=chunks)
        self._prefilled_last = False
        return Step(decode=running) if running else None

    def remove(self, request_id: str) -> bool:
        """Take a request out, at whatever stage, and free its pages. False if it is not here."""
        sequence = self.admitted.pop(request_id, None)
        if sequence is not None:
            self.pool.free(sequence.pages)
            sequence.pages = []
            return True
        for queued in self.waiting:
            if queued.request_id == request_id:
                self.waiting.remove(queued)
                return True
        return False

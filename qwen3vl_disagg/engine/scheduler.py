"""Who runs in the next step. Pure: sequences, page ids and counts; no tensors, clock or thread.

A request is admitted, in order of arrival, once pages for its whole life are free (prompt and all new tokens), so a
running request never runs out. It is then prefilled when all its items are there, whole, and decoded with all others.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.engine.pages import PagePool
from qwen3vl_disagg.engine.sequence import Sequence


@dataclass(frozen=True)
class Step:
    """What to run now: sequences to prefill whole, or sequences to decode one token of; never both."""

    prefill: list[Sequence] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Admission by pages, prefill by a token budget, prefill and decode in turns when both wait."""

    def __init__(self, pool: PagePool, *, max_running: int, max_prefill_tokens: int) -> None:
        self.pool = pool
        self.max_running, self.max_prefill_tokens = max_running, max_prefill_tokens
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
        return any(s.num_cached or s.has_all_items for s in self.admitted.values())

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
        ready = [s for s in self.admitted.values() if s.num_cached == 0 and s.has_all_items]
        running = [s for s in self.admitted.values() if s.num_cached > 0]
        if ready and not (running and self._prefilled_last):
            self._prefilled_last = True
            chosen, tokens = [ready[0]], ready[0].num_prompt
            for sequence in ready[1:]:
                tokens += sequence.num_prompt
                if tokens > self.max_prefill_tokens:
                    break
                chosen.append(sequence)
            return Step(prefill=chosen)
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

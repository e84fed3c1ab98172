"""A model of the engine and of the loop beside it: admits, finds part of a prompt in its cache, reads rows in order,
gives the tokens of all answers, is preempted. What it reads it compares with what was encoded.

As with the real ones, what the loop has to say to the engine waits for the end of a step, and what the engine has to
say waits for the loop; both keep their order. So rows may come to a request that has been preempted and admitted again
since they were sent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qwen3vl_disagg.core.errors import Failure, ServerError
from qwen3vl_disagg.core.requests import ItemTimings, RequestTimings, TokenLogprob, VisualItem
from qwen3vl_disagg.language.request_book import Said
from qwen3vl_disagg.protocol.allocator import Lease
from qwen3vl_disagg.protocol.messages import Finished, NeedItems, PromptLogprobs, RequestFailed, Submit, Tokens
from qwen3vl_disagg.protocol.session_events import Attempt, Consumed, Recall, Returned
from tools.simulation import checks

MAX_RUNNING = 3
VECTOR = bytes(4)
MAX_PREEMPTED = 2
"""Of one request."""


@dataclass(slots=True)
class Window:
    """Rows [start, stop) of an attempt, and the leases they lie in; `first` is the first row that was asked for."""

    attempt: Attempt
    first: int
    start: int
    stop: int
    room: Lease
    hold: Lease


@dataclass(slots=True)
class _Sequence:
    """A prompt of nothing but visual rows. `cached` of them are in the cache; of these, `found` were at admission."""

    submit: Submit
    is_admitted: bool = False
    found: int = 0
    cached: int = 0
    attempts: dict[int, int] = field(default_factory=dict)
    """Item -> whose rows of it were read since the last admission or restart."""
    windows: dict[int, Window] = field(default_factory=dict)
    lists_prompt: bool = False
    """Log probabilities of the prompt's tokens are asked for, and have not been given."""
    tokens: dict[int, int] = field(init=False)
    """Of each answer that has not ended."""
    num_preempted: int = 0
    waits_until: float = 0.0
    text_s: float = 0.0
    """How long the prompt's text takes, behind its rows."""
    pace_s: float = 0.0
    """How long a token takes at most, beside the step."""
    decodes_at: float = 0.0
    preempted_at: float = math.inf
    """When it is, if it still waits for rows."""
    fails_at: float = math.inf
    """When a step of it fails."""
    offsets: list[int] = field(init=False)
    """Of each item's first row, and of what is behind the last one."""

    def __post_init__(self) -> None:
        self.tokens = dict.fromkeys(range(self.submit.sampling.n), 0)
        self.offsets = [0, *itertools.accumulate(item.num_rows for item in self.items)]

    @property
    def num_rows(self) -> int:
        return self.offsets[-1]

    @property
    def items(self) -> list[VisualItem]:
        return self.submit.items

    def offset(self, item: int) -> int:
        return self.offsets[item]

    def first_row(self, item: int) -> int:
        """The first row that is needed; `num_rows` when none is."""
        return min(max(0, self.found - self.offset(item)), self.items[item].num_rows)

    def next_row(self, item: int) -> int:
        return max(0, self.cached - self.offset(item))

    @property
    def window(self) -> Window | None:
        """What can be read now."""
        for item, visual in enumerate(self.items):
            if self.cached < self.offset(item) + visual.num_rows:
                return self.windows.get(item)
        return None


class SimEngine:
    """Steps take time. `known`: the requests that it has."""

    def __init__(self, rank: Any) -> None:
        self.rank, self.world = rank, rank.world
        self.known: dict[str, _Sequence] = {}
        self.cancelled: tuple[str, int | None] | None = None
        """What it was told last to end: a request, or an answer of it."""
        self._commands: list[tuple[Callable[..., None], Any]] = []
        self._is_stepping = False
        self._said_at = 0.0

    # ---- what the loop tells it ----

    def add(self, message: Submit) -> None:
        self._command(self._add, message)

    def cancel(self, request_id: str, sample: int | None) -> None:
        self.cancelled = (request_id, sample)
        if sample is None:
            self._command(self._leave, request_id)
        else:
            self._command(self._remove_answer, (request_id, sample))

    def provide(self, window: Window) -> None:
        self._command(self._take_rows, window)

    def recall(self, recall: Recall) -> None:
        self._command(self._restart, recall)

    def _command(self, do: Callable[..., None], value: Any) -> None:
        self._commands.append((do, value))
        self._wake()

    # ---- the engine: what it is told ----

    def _say(self, event: Said, sequence: _Sequence) -> None:
        self._post(self.rank.hear, event, sequence.submit)

    def _post(self, do: Callable[..., None], *args: Any) -> None:
        """The loop hears of it soon, but now and then it has other things to do first."""
        delay = (0.1 if self.world.random() < 0.25 else 0.004) * self.world.random() * self.rank.slowness
        self._said_at = max(self._said_at, self.world.now + delay)
        self.world.at_time(self._said_at, self.rank, do, *args)

    def _add(self, message: Submit) -> None:
        text_s = 10.0 * self.world.random() if self.world.random() < 0.3 else 0.0
        pace_s = self.world.rng.choice((0.0, 2.0, 4.0)) if message.keep_as else 0.0
        sequence = self.known[message.request_id] = _Sequence(message, text_s=text_s, pace_s=pace_s)
        sequence.lists_prompt = message.sampling.pooling is None and self.world.random() < 0.2
        if message.keep_as and self.world.random() < 0.1:
            sequence.fails_at = self.world.now + 3.0 + 10.0 * self.world.random()

    def _leave(self, request_id: str) -> None:
        self._remove(request_id)
        self._post(self.rank.book.left, request_id)

    def _remove(self, request_id: str) -> None:
        self.known.pop(request_id, None)

    def _remove_answer(self, answer: tuple[str, int]) -> None:
        request_id, sample = answer
        if request_id in self.known:
            self.known[request_id].tokens.pop(sample, None)
            if not self.known[request_id].tokens:
                self._remove(request_id)

    def _take_rows(self, window: Window) -> None:
        """Rows that are all in the cache are used at once; those that do not follow on what is there can only be of an
        attempt before, and their recall is on its way."""
        request_id, item, _ = window.attempt
        sequence = self.known.get(request_id)
        if sequence is None or not sequence.is_admitted:
            return
        if window.stop <= sequence.next_row(item):
            self._say(Consumed(*window.attempt, window.stop), sequence)
        elif window.start <= sequence.next_row(item):
            sequence.windows[item] = window

    def _restart(self, recall: Recall) -> None:
        """Back to the item's first needed row, unless all of it is in the cache."""
        sequence, item = self.known.get(recall.request_id), recall.item
        if sequence is not None and sequence.is_admitted:
            sequence.windows.pop(item, None)
            if sequence.next_row(item) < sequence.items[item].num_rows:
                sequence.cached = min(sequence.cached, sequence.offset(item) + sequence.first_row(item))
                sequence.attempts.pop(item, None)
        self._post(self.rank.handle, Returned(recall.request_id, item, recall.attempt))

    # ---- the engine: what it does ----

    def _wake(self) -> None:
        if not self._is_stepping:
            self._is_stepping = True
            self.world.at(0.001 + 0.02 * self.world.random() * self.rank.slowness, self.rank, self._step)

    def _step(self) -> None:
        """Commands first, then one batch: which rows it reads is fixed now, it has read them at its end."""
        commands, self._commands = self._commands, []
        for do, value in commands:
            do(value)
        self._preempt()
        self._admit()
        work: list[tuple[_Sequence, Window | None]] = []
        for sequence in self.known.values():
            if not sequence.is_admitted:
                continue
            window, is_done = sequence.window, sequence.cached == sequence.num_rows
            if window or (is_done and sequence.decodes_at <= self.world.now):
                checks.one_attempt(sequence.attempts, window)
                work.append((sequence, window))
        if work:
            self.world.at((0.002 + 0.03 * self.world.random()) * self.rank.slowness, self.rank, self._end, work)
        else:
            self._is_stepping = False
            if self._commands:
                self._wake()

    def _preempt(self) -> None:
        """Now and then somebody gives all up, and waits to be admitted again; some while they wait for rows, and then
        for long, so that hubs die meanwhile."""
        for request_id, sequence in self.known.items():
            may = sequence.is_admitted and sequence.num_preempted < MAX_PREEMPTED
            if may and sequence.preempted_at <= self.world.now and sequence.cached < sequence.num_rows:
                self._give_up_pages(request_id, sequence, 4.0 * self.world.random())
            elif may and self.world.random() < self.rank.cluster.preemption:
                patience = self.world.random() * self.world.random() if self.world.random() < 0.3 else 0.0
                self._give_up_pages(request_id, sequence, patience)

    def _give_up_pages(self, request_id: str, sequence: _Sequence, patience: float) -> None:
        sequence.is_admitted, sequence.preempted_at = False, math.inf
        sequence.found = sequence.cached = 0
        sequence.windows.clear()
        sequence.attempts.clear()
        sequence.num_preempted += 1
        sequence.waits_until = self.world.now + patience
        self._post(self.rank.preempted, request_id, sequence.submit)
        self.world.at(patience, self.rank, self._wake)

    def _admit(self) -> None:
        running = sum([s.is_admitted for s in self.known.values()])
        if running == min(len(self.known), MAX_RUNNING):
            return
        for request_id, sequence in self.known.items():
            if not sequence.is_admitted and sequence.waits_until <= self.world.now and running < MAX_RUNNING:
                running += 1
                sequence.is_admitted = True
                sequence.found = sequence.cached = self._find(sequence)
                firsts = [sequence.first_row(item) for item in range(len(sequence.items))]
                lacking = [item for item, first in enumerate(firsts) if first < sequence.items[item].num_rows]
                if lacking:
                    firsts = [firsts[item] for item in lacking]
                    self._say(NeedItems(request_id=request_id, items=lacking, first_rows=firsts), sequence)
                    if sequence.submit.keep_as and not sequence.num_preempted and self.world.random() < 0.25:
                        seconds = 0.4 * self.world.random()
                        sequence.preempted_at = self.world.now + seconds
                        self.world.at(seconds, self.rank, self._wake)

    def _find(self, sequence: _Sequence) -> int:
        """How much of the prompt is in the prefix cache: up to any row. A bad image was never encoded."""
        if not sequence.items or sequence.items[0].digest in ("bad", "poison") or self.world.random() < 0.5:
            return 0
        return sequence.num_rows if self.world.random() < 0.2 else self.world.rng.randint(0, sequence.num_rows)

    def _end(self, work: list[tuple[_Sequence, Window | None]]) -> None:
        for sequence, window in work:
            is_over = sequence.fails_at <= self.world.now or self.world.happens("allocation", 0.05)
            if is_over and sequence.submit.request_id in self.known:
                self._fail(sequence)
            elif window is None:
                self._give_tokens(sequence)
            else:
                checks.read(self.rank, window, sequence.next_row(window.attempt[1]), window.stop)
                self._consume(sequence, window)
        self._is_stepping = False
        self._wake()

    def may_fail(self, request_id: str) -> None:
        """It has been adopted, and a step of it may fail all the same."""
        if request_id in self.known and self.world.random() < 0.4:
            self.known[request_id].fails_at = self.world.now + 4.0 * self.world.random()

    def _fail(self, sequence: _Sequence) -> None:
        """A step has failed, and the request with it."""
        request_id = sequence.submit.request_id
        self._remove(request_id)
        self._say(RequestFailed(request_id=request_id, failure=Failure.of(ServerError("out of pages"))), sequence)

    def _consume(self, sequence: _Sequence, window: Window) -> None:
        _, item, number = window.attempt
        sequence.cached, sequence.attempts[item] = sequence.offset(item) + window.stop, number
        if sequence.cached == sequence.num_rows and sequence.text_s:
            self._decode_after(sequence, sequence.text_s)
        del sequence.windows[item]
        self._say(Consumed(*window.attempt, window.stop), sequence)

    def _decode_after(self, sequence: _Sequence, seconds: float) -> None:
        sequence.decodes_at = self.world.now + seconds
        self.world.at(seconds, self.rank, self._wake)

    def _give_tokens(self, sequence: _Sequence) -> None:
        """One to most of the answers: others may have been preempted."""
        request_id, sampling = sequence.submit.request_id, sequence.submit.sampling
        if sequence.lists_prompt:
            sequence.lists_prompt = False
            own = bytes(4 * sequence.num_rows)
            scores = PromptLogprobs(request_id=request_id, index=0, own=own, ranks=own, top_ids=b"", top=b"")
            self._say(scores, sequence)
        if sequence.pace_s:
            self._decode_after(sequence, sequence.pace_s * self.world.random())
        for sample, index in list(sequence.tokens.items()):
            if len(sequence.tokens) > 1 and self.world.random() < 0.3:
                continue
            stop = min(index + (2 if self.world.random() < 0.2 else 1), sampling.max_new_tokens)
            sequence.tokens[sample] = stop
            if sampling.pooling is None:
                ids = [*range(index, stop)]
                logprobs = [TokenLogprob(0, 0.0, [])] * len(ids) if sequence.num_rows % 4 == 1 else None
                timings = None if index else self._timings(sequence)
                self._say(
                    Tokens(
                        request_id=request_id,
                        index=index,
                        token_ids=ids,
                        logprobs=logprobs,
                        timings=timings,
                        sample=sample,
                    ),
                    sequence,
                )
            if stop == sampling.max_new_tokens:
                self._remove_answer((request_id, sample))
                vector = b"" if sampling.pooling is None else VECTOR
                self._say(self._end_of(sequence, request_id, sample, vector), sequence)

    def _timings(self, sequence: _Sequence) -> RequestTimings:
        """What prices follow from."""
        items = [ItemTimings(encode=100.0 * self.world.random(), rows=item.num_rows) for item in sequence.items]
        return RequestTimings(prefill=100.0 * self.world.random(), items=items)

    def _end_of(self, sequence: _Sequence, request_id: str, sample: int, vector: bytes) -> Finished:
        timings = self._timings(sequence)
        return Finished(request_id=request_id, finish_reason="length", timings=timings, vector=vector, sample=sample)

"""A model of the engine: admits, reads rows in order, gives tokens. What it reads it compares with what was encoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwen3vl_disagg.core.requests import RequestTimings
from qwen3vl_disagg.disagg.allocator import Lease
from qwen3vl_disagg.disagg.messages import Finished, NeedItems, Submit, Tokens
from qwen3vl_disagg.disagg.session_events import Attempt, Consumed, Expect, Forget, Recall, Returned
from qwen3vl_disagg.disagg.simulation import checks

if TYPE_CHECKING:
    from qwen3vl_disagg.disagg.simulation.language import SimLanguage

MAX_RUNNING = 3


@dataclass(slots=True)
class Window:
    """Rows [start, stop) of an attempt, and the leases they lie in."""

    attempt: Attempt
    start: int
    stop: int
    room: Lease
    hold: Lease


@dataclass(slots=True)
class _Sequence:
    submit: Submit
    deadline: float
    is_admitted: bool = False
    item: int = 0
    """The item that prefill has come to, and how many of its rows it has read, of which attempt."""
    consumed: int = 0
    attempt: int = 0
    tokens: int = 0
    windows: dict[int, Window] = field(default_factory=dict)

    @property
    def is_prefilled(self) -> bool:
        return self.item == len(self.submit.items)


class SimEngine:
    """Steps take time; commands wait for the step's end, as they do for the real engine's thread."""

    def __init__(self, rank: SimLanguage) -> None:
        self.rank, self.world = rank, rank.world
        self.known: dict[str, _Sequence] = {}
        self._commands: list[Recall] = []
        self._is_stepping = False

    def submit(self, message: Submit) -> None:
        self.known[message.request_id] = _Sequence(message, self.world.now + message.timeout_s)
        self._admit()
        self._wake()

    def _admit(self) -> None:
        running = sum(1 for s in self.known.values() if s.is_admitted)
        for sequence in self.known.values():
            if not sequence.is_admitted and running < MAX_RUNNING:
                running += 1
                sequence.is_admitted = True
                submit = sequence.submit
                if submit.items:
                    lacking = list(range(len(submit.items)))
                    self.rank.handle(Expect(submit.request_id, submit.items, lacking, sequence.deadline))
                    self.rank.tell(NeedItems(request_id=submit.request_id, items=lacking))

    def cancel(self, request_id: str) -> None:
        self.known.pop(request_id, None)
        self._admit()
        self._wake()

    def forget(self, request_id: str) -> None:
        self.cancel(request_id)
        self.rank.handle(Forget(request_id))

    def provide(self, window: Window) -> None:
        sequence = self.known.get(window.attempt[0])
        if sequence is not None and sequence.item <= window.attempt[1]:
            sequence.windows[window.attempt[1]] = window
        self._wake()

    def recall(self, command: Recall) -> None:
        self._commands.append(command)
        self._wake()

    def _wake(self) -> None:
        if not self._is_stepping:
            self._is_stepping = True
            self.world.at(0.001 + 0.02 * self.world.random() * self.rank.slowness, self.rank, self._step)

    def _step(self) -> None:
        """Commands first, then one batch: which rows it reads is fixed now, it has read them at its end."""
        commands, self._commands = self._commands, []
        for command in commands:
            sequence = self.known.get(command.request_id)
            if sequence is not None:
                sequence.windows.pop(command.item, None)
                if sequence.item >= command.item:
                    sequence.item, sequence.consumed = command.item, 0
            self.rank.handle(Returned(command.request_id, command.item, command.attempt))
        work: list[tuple[_Sequence, Window | None]] = []
        for sequence in self.known.values():
            if sequence.is_admitted:
                window = sequence.windows.get(sequence.item)
                if window is not None:
                    checks.one_attempt(sequence.attempt, sequence.consumed, window)
                    work.append((sequence, window))
                elif sequence.is_prefilled:
                    work.append((sequence, None))
        if work:
            self.world.at((0.002 + 0.03 * self.world.random()) * self.rank.slowness, self.rank, self._end, work)
        else:
            self._is_stepping = False
            if self._commands:
                self._wake()

    def _end(self, work: list[tuple[_Sequence, Window | None]]) -> None:
        for sequence, window in work:
            request_id = sequence.submit.request_id
            start = sequence.consumed
            if window is not None:
                checks.read(self.rank, window, max(start, window.start), window.stop)
            if self.known.get(request_id) is not sequence:
                continue
            if window is None:
                self._token(sequence)
            elif window.start <= start < window.stop:
                self._consume(sequence, window)
        self._is_stepping = False
        self._wake()

    def _consume(self, sequence: _Sequence, window: Window) -> None:
        item = window.attempt[1]
        sequence.consumed, sequence.attempt = window.stop, window.attempt[2]
        if sequence.windows.get(item) is window:
            del sequence.windows[item]
        if window.stop == sequence.submit.items[item].num_rows:
            sequence.item, sequence.consumed = item + 1, 0
        self.world.at(0.0, self.rank, self.rank.handle, Consumed(*window.attempt, window.stop))

    def _token(self, sequence: _Sequence) -> None:
        request_id = sequence.submit.request_id
        index = sequence.tokens
        sequence.tokens += 1
        self.rank.tell(Tokens(request_id=request_id, index=index, token_ids=[index]))
        if sequence.tokens == sequence.submit.sampling.max_new_tokens:
            self.rank.tell(Finished(request_id=request_id, finish_reason="length", timings=RequestTimings()))
            self.forget(request_id)

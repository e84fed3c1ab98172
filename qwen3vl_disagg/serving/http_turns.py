"""HTTP is parsed in turns, so that no client holds up the event loop that owes heartbeats to the ranks.

What comes from a socket waits in the connection; a turn parses so many events of it. Turns of all connections together
get a slice of time, then the loop runs everything else before the next slice. Who asks how the server is comes first,
then short requests, long ones, and who was not done when its turn ended; one of each kind always has its turn.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, Protocol

import h11

SLICE_S = 0.003
REST_S = 0.002
EVENTS_PER_TURN = 64
PARSE_BYTES = 16 * 2**10
"""Given to the parser at a time: a block of headers costs most, and cannot be parsed in parts."""
SHORT_BYTES = 2**10
MAX_HEADER_LINES = 256
WAKE_S = 0.0003
"""What a handler costs at least that was set going, on the same loop right after the slice."""
MAX_OVERHEAD = 64 * 2**10
OVERHEAD_SHARE = 8
"""A body may have MAX_OVERHEAD bytes of framing (sizes of chunks, extensions, trailers), and an eighth of its size."""


class Cut:
    """The last event of a turn: there may be more in the buffer."""


class TurnParser(h11.Connection):
    """h11's connection, a bounded number of events at a time, and a bounded framing.

    `last`: what `next_event` said last, `Cut` where the turn was over.
    """

    def __init__(self, max_header_bytes: int) -> None:
        super().__init__(h11.SERVER, max_header_bytes)
        self.last: Any = h11.NEED_DATA
        self.is_wasteful = False
        self.num_requests = 0
        self.num_body_bytes = 0
        """Of the request under way."""
        self._num_left = 0
        self._num_wire_bytes = 0

    def begin_turn(self) -> None:
        self._num_left = EVENTS_PER_TURN

    def receive_data(self, data: bytes) -> None:
        self._num_wire_bytes += len(data)
        super().receive_data(data)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """RemoteProtocolError also for a body whose framing is out of proportion."""
        if not self._num_left:
            self.last = Cut
            return h11.NEED_DATA
        self._num_left -= 1
        if self.their_state is h11.IDLE:
            self._check_header_lines()
        event = self.last = super().next_event()
        if isinstance(event, h11.Request):
            self.num_requests += 1
            self.num_body_bytes = self._num_wire_bytes = 0
        elif isinstance(event, h11.Data):
            self.num_body_bytes += len(event.data)
        if self._num_wire_bytes - self.num_body_bytes > MAX_OVERHEAD + self.num_body_bytes // OVERHEAD_SHARE:
            self.is_wasteful = self.their_state is h11.SEND_BODY
            if self.is_wasteful:
                raise h11.RemoteProtocolError("the framing of the body is out of proportion")
        return event

    def _check_header_lines(self) -> None:
        """A parsed line costs a hundred times as much as its bytes."""
        head, _ = self.trailing_data
        end = head.find(b"\n\r\n")
        if head.count(b"\n", 0, end if end >= 0 else len(head)) > MAX_HEADER_LINES:
            raise h11.RemoteProtocolError("too many lines of headers", error_status_hint=431)


class HasTurns(Protocol):
    """A connection with something to parse."""

    @property
    def is_urgent(self) -> bool:
        """Whether it asks how the server is."""

    @property
    def num_wakes(self) -> int:
        """How often a turn has set a handler going: with a request, or with the news that the client is gone."""

    @property
    def num_pending(self) -> int:
        """Bytes that wait to be parsed."""

    def take_turn(self) -> bool:
        """Parse a little; whether there is more."""


class ParseTurns:
    """The queue of connections that have something to parse."""

    def __init__(self) -> None:
        self._short: deque[HasTurns] = deque()
        self._long: deque[HasTurns] = deque()
        self._hungry: deque[HasTurns] = deque()
        self._queued: set[HasTurns] = set()
        self._is_due = False

    def add(self, connection: HasTurns) -> None:
        if connection not in self._queued:
            self._queued.add(connection)
            if connection.is_urgent:
                self._short.appendleft(connection)
            else:
                (self._short if connection.num_pending <= SHORT_BYTES else self._long).append(connection)
            self._wake(0.0)

    def _wake(self, delay_s: float) -> None:
        if self._is_due:
            return
        self._is_due = True
        loop = asyncio.get_running_loop()
        if delay_s:
            loop.call_later(delay_s, self._run)
        else:
            loop.call_soon(self._run)

    def _run(self) -> None:
        """One slice."""
        self._is_due = False
        end = time.perf_counter() + SLICE_S
        try:
            for queue in (self._long, self._hungry):
                if queue:
                    self._turn(queue)
            while (left := self._short or self._long or self._hungry) and time.perf_counter() < end:
                end -= WAKE_S * self._turn(left)
        finally:  # a connection that fails is the loop's to report, and none of the others'
            if self._short or self._long or self._hungry:
                self._wake(REST_S)

    def _turn(self, queue: deque[HasTurns]) -> int:
        """How many handlers were set going."""
        connection = queue.popleft()
        self._queued.discard(connection)
        before = connection.num_wakes
        if connection.take_turn() and connection not in self._queued:
            self._queued.add(connection)
            self._hungry.append(connection)
        return connection.num_wakes - before

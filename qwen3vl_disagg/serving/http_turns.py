"""HTTP is parsed in turns, so that no client holds up the event loop that owes heartbeats to the ranks.

What comes from a socket waits in the connection; a turn parses so many events of it. Turns of all connections together
get a slice of time, then the loop runs everything else before the next slice. Who asks how the server is comes first,
then short requests, long ones, and who was not done when its turn ended; one of each kind always has its turn.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Protocol

SLICE_S = 0.003
REST_S = 0.002
SHORT_BYTES = 2**10
WAKE_S = 0.0003
"""What a handler costs at least that was set going, on the same loop right after the slice."""


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

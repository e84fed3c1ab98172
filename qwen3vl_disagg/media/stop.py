"""How a decoding job is ended from outside, also while it waits for its turn."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_SLICE_S = 0.1
"""As long is waited before the StopSignal is looked at again."""


class Stopped(Exception):
    """The job was ended by its StopSignal. Nothing is wrong with the media, so it is no InputError."""


class StopSignal:
    """Ends jobs of a MediaDecoder from any thread. Thread-safe; one StopSignal may belong to many jobs; it stays set.

    `deadline` is a reading of `time.monotonic()`: once it has passed, the StopSignal counts as set. None: no deadline.
    A job whose StopSignal is set raises Stopped within 0.2 s, and at once if it was set before the job began.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self._event = threading.Event()

    def set(self) -> None:
        """Ends the jobs that have this StopSignal, those that run and those that come. Never blocks."""
        self._event.set()

    @property
    def is_set(self) -> bool:
        """Whether `set` was called or the deadline has passed."""
        return self._event.is_set() or self.seconds_left() <= 0

    def seconds_left(self) -> float:
        """Until the deadline, negative after it; infinity without one."""
        return math.inf if self.deadline is None else self.deadline - time.monotonic()

    def check(self) -> None:
        """Stopped if it is set."""
        if self.is_set:
            raise Stopped

    def result_of(self, job: Future[T]) -> T:
        """What comes of it, or what it raises; Stopped if this is set before."""
        while not wait([job], timeout=_SLICE_S).done:
            self.check()
        return job.result()


class Slots:
    """So many jobs at a time; the others wait in the order in which they came, as long as each one's signal lets it."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def one(self, stop: StopSignal) -> Iterator[None]:
        """One of them for as long as the block runs. Stopped if the StopSignal is set before one is free."""
        self._take(stop)
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()

    def _take(self, stop: StopSignal) -> None:
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                stop.check()
                while self._queue[0] is not ticket or not self._free:
                    self._changed.wait(max(0.0, min(_SLICE_S, stop.seconds_left())))
                    stop.check()
                self._free -= 1
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

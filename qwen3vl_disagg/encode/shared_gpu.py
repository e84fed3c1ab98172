"""One GPU for a tower and a decoder of one process, without a stall of either.

Each has a stream of its own, and the decoder's has the higher priority: where both have kernels, its own go first. What
the tower has launched goes on beside them, so it launches a budget of work for each decode step, block by block, and
waits for the device before it asks for more. While nobody decodes it does the same without waiting for steps.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from qwen3vl_disagg.core.devices import use_device

FIRST, MOST = 1024.0, 65_536.0
"""Of the tower beside a decode step: visual tokens' worth of work in one block, as `tower_cost` counts."""
STEPS_A_BLOCK = 2
"""However slow decode steps become: after so many there is another block, so that images come to an end."""
LOOK_AGAIN = 32
"""Decode steps beside the tower, after which one is taken alone: what that takes changes with who is there."""
STALE_S = 0.5
"""A decode step that takes longer is not waited for: whoever steps the engine may have paused."""
_MOST_FACTOR = 4.0


class TowerPace:
    """`budget`: the tower's work beside a decode step, so that the step takes at most `slowdown` times as long as
    alone. Pure.

    What a step takes is not proportional to the work beside it, so the budget goes half of the way, in its logarithm,
    to what the last step promises.
    """

    def __init__(self, slowdown: float) -> None:
        self._slowdown, self.budget = slowdown, FIRST
        self._alone: deque[float] = deque(maxlen=5)
        self._num_beside = 0

    def decoded(self, seconds: float, work: float) -> None:
        """A decode step took so long beside so much of the tower. The middle of the last ones alone counts."""
        self._num_beside += 1
        if not work:
            self._alone.append(seconds)
            self._num_beside = 0
        if not work or not self._alone:
            return
        alone_s = sorted(self._alone)[(len(self._alone) - 1) // 2]
        factor = self._slowdown * alone_s / max(seconds, 1e-6)
        if factor > 1 and work < self.budget:
            return  # that says nothing about more
        self.budget *= min(max(factor, 1 / _MOST_FACTOR), _MOST_FACTOR) ** 0.5
        self.budget = min(max(self.budget, 1.0), MOST)

    @property
    def wants_one_alone(self) -> bool:
        return self._num_beside >= LOOK_AGAIN


class TowerTurns:
    """Who may launch when: the tower asks `before` each block, the engine tells each step by `stepped`. `wait` returns
    when the device has done all that the tower launched."""

    def __init__(self, pace: TowerPace, wait: Callable[[], None]) -> None:
        self.pace, self._wait = pace, wait
        self._told = threading.Condition()
        self._is_decoding, self._credit = False, 0.0
        self._beside = self._out = 0.0
        """The tower's work during this step, and what of it may not be done yet."""
        self._cost = 0.0
        """Of the last block."""

    def before(self, cost: float) -> None:
        """Launch a block of that much work; returns when it is its turn."""
        with self._told:
            may_go = self._credit > 0
        if not may_go:
            self._wait()
        with self._told:
            if not may_go:
                self._out = 0.0
            if not self._told.wait_for(lambda: self._credit > 0 or not self._is_decoding, STALE_S):
                self._is_decoding = False
            if self._credit <= 0:
                self._credit = self._share(cost)
            self._credit -= cost
            self._beside += cost
            self._out += cost
            self._cost = cost

    def ended(self) -> None:
        """All that the tower launched is done."""
        with self._told:
            self._out = 0.0

    def stepped(self, seconds: float | None, *, is_decoding: bool) -> None:
        """The engine took a step; `seconds`, if it was one of decode alone. `is_decoding`: another one follows."""
        with self._told:
            if seconds is not None:
                self.pace.decoded(seconds, self._beside)
            self._beside, self._is_decoding = self._out, is_decoding
            share = self._share(self._cost)
            withholds = seconds is not None and self.pace.wants_one_alone
            self._credit = min(self._credit, 0.0) if withholds else min(self._credit + share, share)
            self._told.notify_all()

    def _share(self, cost: float) -> float:
        return max(self.pace.budget, cost / STEPS_A_BLOCK)


class Schedule(Protocol):
    """What there is to know of an engine's scheduler."""

    @property
    def num_decoding(self) -> int: ...

    @property
    def num_prefills(self) -> int: ...


class SharedGpu:
    """The two streams of a GPU, and whose turn it is. `slowdown`: see `TowerPace`."""

    def __init__(self, device: torch.device, slowdown: float) -> None:
        torch.cuda.synchronize(device)  # weights are there for both
        self._device = device
        self._tower = torch.cuda.Stream(device)
        self._decoder = torch.cuda.Stream(device, priority=-1)
        self._in_tower = threading.Lock()
        self.turns = TowerTurns(TowerPace(slowdown), self._tower.synchronize)

    @contextmanager
    def tower(self) -> Iterator[None]:
        """What is launched here is the tower's; whoever launches waits for it. One batch at a time, also where one was
        given up that still runs."""
        use_device(self._device)  # what the end of the context goes back to
        with self._in_tower, torch.cuda.stream(self._tower):
            try:
                yield
            finally:
                self.turns.ended()

    def wait_for_decoder(self) -> None:
        """Until nothing runs any more of what was launched for steps."""
        self._decoder.synchronize()

    @contextmanager
    def step(self, schedule: Schedule) -> Iterator[None]:
        """What is launched here is the decoder's."""
        use_device(self._device)
        started, num_prefills = time.monotonic(), schedule.num_prefills
        was_decoding = schedule.num_decoding > 0
        with torch.cuda.stream(self._decoder):
            yield
        seconds = time.monotonic() - started if was_decoding and schedule.num_prefills == num_prefills else None
        self.turns.stepped(seconds, is_decoding=schedule.num_decoding > 0)

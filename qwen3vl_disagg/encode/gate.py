"""Waiting one's turn on one event loop: through a gate, many at a time or one alone; for a share of an amount."""

from __future__ import annotations

import asyncio
from bisect import insort
from collections import deque
from itertools import count

from qwen3vl_disagg.core.due import FIRST_COME


class Gate:
    """`leave` once for each `enter` that returned. Nobody passes while one who is alone is inside."""

    def __init__(self) -> None:
        self.num_inside = 0
        self._is_alone = False
        self._queue: deque[tuple[bool, asyncio.Future[None]]] = deque()

    async def enter(self, *, alone: bool) -> None:
        """Wait for the turn; when that is cancelled, the turn goes to the next."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((alone, turn))
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._let_in()
            else:
                self.leave()
            raise

    def leave(self) -> None:
        self.num_inside -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._queue:
            alone, turn = self._queue[0]
            if not turn.done():
                if self.num_inside and (alone or self._is_alone):
                    return
                self.num_inside, self._is_alone = self.num_inside + 1, alone
                turn.set_result(None)
            self._queue.popleft()


class Budget:
    """An amount that many share; the most urgent is first, then who came first, and nobody passes who waits before it.
    What is alone always fits, however much it is."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._numbers = count()
        self._line: list[tuple[float, int, int, asyncio.Future[None], object]] = []

    async def take(self, amount: int, due: float = FIRST_COME, of: object = None) -> None:
        """Wait until it fits. `give` it back once. `of`: whose it is, for `hasten`."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        insort(self._line, (due, next(self._numbers), amount, turn, of))
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            self.give(0 if turn.cancelled() else amount)
            raise

    def hasten(self, of: object, due: float) -> None:
        """What waits as `of`, if anything does, is more urgent than it was."""
        self._line = sorted((due if entry[-1] is of else entry[0], *entry[1:]) for entry in self._line)
        self._let_in()

    def give(self, amount: int) -> None:
        self.used -= amount
        self._let_in()

    def _let_in(self) -> None:
        while self._line:
            _, _, amount, turn, _ = self._line[0]
            if not turn.done():
                if self.used and self.used + amount > self.limit:
                    return
                self.used += amount
                turn.set_result(None)
            self._line.pop(0)

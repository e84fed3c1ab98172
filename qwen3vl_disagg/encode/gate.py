"""Waiting one's turn on one event loop: through a gate, many at a time or one alone; for a share of an amount."""

from __future__ import annotations

import asyncio
from collections import deque


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
    """An amount that many share; who came first is first. What is alone always fits, however much it is."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._turn = asyncio.Lock()
        self._has_room = asyncio.Event()

    async def take(self, amount: int) -> None:
        """Wait until it fits. `give` it back once."""
        async with self._turn:
            while self.used and self.used + amount > self.limit:
                self._has_room.clear()
                await self._has_room.wait()
            self.used += amount

    def give(self, amount: int) -> None:
        self.used -= amount
        self._has_room.set()

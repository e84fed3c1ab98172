"""How a machine is run: one event at a time, and what it says to each is done before the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

EventT = TypeVar("EventT")
ActionT = TypeVar("ActionT")
Decide = Callable[[EventT, float], Iterable[ActionT]]


class Pump(Generic[EventT, ActionT]):
    """`handle` events: `decide` says what is to be done, `perform` does it. What comes up meanwhile waits its turn."""

    def __init__(
        self, decide: Decide[EventT, ActionT], perform: Callable[[ActionT], None], clock: Callable[[], float]
    ) -> None:
        self._decide, self._perform, self._clock = decide, perform, clock
        self._events: deque[EventT] = deque()
        self._is_handling = False

    def handle(self, event: EventT) -> None:
        """What `perform` raises ends this call; events that wait go on with the next one."""
        self._events.append(event)
        if self._is_handling:
            return
        self._is_handling = True
        try:
            while self._events:
                for action in self._decide(self._events.popleft(), self._clock()):
                    self._perform(action)
        finally:
            self._is_handling = False

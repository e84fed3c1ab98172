"""How long something has been as it is, seen by whoever looks once a second."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

MOST_S = 1.5
"""From one look to the next; after a longer pause (the process was frozen) all begins anew."""


class Stays:
    """Seconds since each mark was first seen at every look. Never longer than it really stayed."""

    __slots__ = ("_before", "_looked_at", "_now", "_since")

    def __init__(self, world: Any) -> None:
        self._before: dict[Hashable, float] = {}
        self._since: dict[Hashable, float] = {}
        self._now = self._looked_at = world.now

    def look(self, now: float) -> Stays:
        """Begin a look."""
        if now - self._looked_at > MOST_S:
            self._before = {}
        self._now = self._looked_at = now
        return self

    def stay(self, mark: Hashable) -> float:
        """It is there; how long it has been."""
        since = self._since[mark] = self._before.get(mark, self._now)
        return self._now - since

    def done(self) -> None:
        """What was not seen in this look is gone."""
        self._before, self._since = self._since, {}

    def forget(self) -> None:
        """Nothing is there."""
        self._before = {}

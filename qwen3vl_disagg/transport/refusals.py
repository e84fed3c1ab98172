"""What peers are turned away for, in the log: once a minute for each host, however often they come."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)
SAY_AGAIN_S = 60.0
MAX_HOSTS = 64
"""Of which is remembered that something was said. When so many were told of within a minute, no more are."""


class Refusals:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said_at: dict[str, float] = {}

    def say(self, host: str, line: str) -> None:
        now = self._clock()
        for old in [other for other, at in self._said_at.items() if now - at >= SAY_AGAIN_S]:
            del self._said_at[old]
        if host not in self._said_at and len(self._said_at) < MAX_HOSTS:
            self._said_at[host] = now
            logger.warning("%s", line)

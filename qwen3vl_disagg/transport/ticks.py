"""Time for machines that run on an event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from qwen3vl_disagg.protocol.session_events import Tick

logger = logging.getLogger(__name__)
TICK_S = 0.25


async def tick(handle: Callable[[Tick], None], *, must_succeed: bool = False) -> None:
    """Let time pass, until cancelled. A tick that fails goes to the log, because without ticks there would be no
    deadlines; with `must_succeed` it is raised."""
    while True:
        await asyncio.sleep(TICK_S)
        try:
            handle(Tick())
        except Exception as error:
            if must_succeed:
                raise
            logger.error("a tick failed", exc_info=error)

"""Ticks go on when one of them fails, unless that is to be known."""

from __future__ import annotations

import asyncio
import logging

import pytest

from qwen3vl_disagg.protocol.session_events import Tick
from qwen3vl_disagg.transport import ticks


class Odd(Exception):
    """What no code expects."""


def test_a_tick_that_fails_is_logged_and_the_next_one_comes(monkeypatch, caplog):
    monkeypatch.setattr(ticks, "TICK_S", 0.001)
    seen: list[Tick] = []

    async def scenario() -> None:
        third = asyncio.Event()

        def handle(event: Tick) -> None:
            seen.append(event)
            if len(seen) == 1:
                raise Odd
            if len(seen) == 3:
                third.set()

        ticking = asyncio.create_task(ticks.tick(handle))
        await asyncio.wait_for(third.wait(), 5)
        ticking.cancel()

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    assert [record.message for record in caplog.records] == ["a tick failed"]


def test_where_ticks_must_succeed_the_failure_is_raised(monkeypatch):
    monkeypatch.setattr(ticks, "TICK_S", 0.001)

    def handle(_: Tick) -> None:
        raise Odd

    async def scenario() -> None:
        await asyncio.wait_for(ticks.tick(handle, must_succeed=True), 5)

    with pytest.raises(Odd):
        asyncio.run(scenario())

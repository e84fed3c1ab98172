"""Ranks that join and leave, in every way in which one can, leave nothing behind."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_disagg.cluster.traces import Traces
from qwen3vl_disagg.core.spans import MAX_SPANS
from qwen3vl_disagg.encode import rank as encode_rank
from qwen3vl_disagg.language.link_server import LinkServer
from qwen3vl_disagg.protocol.admission import Admission
from qwen3vl_disagg.protocol.routing import RouterLimits
from qwen3vl_disagg.protocol.session_events import LinkDown
from qwen3vl_disagg.serving import metrics as metrics_module
from tests.support.held import grown, names_of
from tests.support.joins import ENDS, job, joins

WARM_UP, QUICK, MANY = 2 * len(ENDS), 4 * len(ENDS), 1000
SUSPECTS = RouterLimits().max_suspects
BOUNDED = {
    "core.spans.ring": MAX_SPANS,
    "qwen3vl_disagg.core.spans.Span": MAX_SPANS,
    "hub._router._attempts._suspects._records": SUSPECTS,
    "qwen3vl_disagg.protocol.suspects._Record": SUSPECTS,
    "threads": 2 + min(32, (os.cpu_count() or 1) + 4),
}
"""What keeps the last of something, until it is full; the loop's own pool of threads beside the main one."""


@pytest.fixture(autouse=True)
def _short_times(monkeypatch):
    monkeypatch.setattr(metrics_module, "GONE_S", 0.5)
    monkeypatch.setattr(encode_rank, "DRAIN_S", 2.0)  # a timer has the rank until then


def resident_kib() -> int:
    """Private memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


async def left_by(count: int, sizes: list[int] | None = None, warm_up: int = WARM_UP) -> list[str]:
    """What `count` ranks have left behind that the first few had not."""

    def look(number: int) -> None:
        if sizes is not None and number % 50 == 49:
            sizes.append(resident_kib())

    async with asyncio.timeout(30 + count), job() as it:
        await joins(it, warm_up, seed=1)
        before = await it.settled()
        await joins(it, count, seed=2, on_each=look)
        after = await it.settled()
        assert it.ends.total() == warm_up + count
        assert set(it.ends) == set(ENDS)
        return grown(before, after, BOUNDED)


def test_joins_and_leaves_leave_nothing_behind():
    assert asyncio.run(left_by(QUICK)) == []


@pytest.mark.acceptance
def test_a_thousand_joins_and_leaves_leave_nothing_behind():
    sizes: list[int] = []
    assert asyncio.run(left_by(MANY, sizes)) == []
    print(f"RssAnon, MiB, each 50 joins: {[size // 1024 for size in sizes]}")
    assert sizes[-1] - sizes[len(sizes) // 2] < 4096, "private memory grows"


def test_leaks_are_named_by_where_they_are(monkeypatch):
    """In the hub, in its router, in the link server: a map that is never cleaned."""

    def drop(self: LinkServer, link: Any, reason: str) -> None:
        link.payload.close()
        link.thread.shutdown(wait=False)
        self.handle(LinkDown(link.encode_rank, link.epoch, reason))

    monkeypatch.setattr(Traces, "down", lambda *_: None)
    monkeypatch.setattr(Admission, "leave", lambda *_, **__: None)
    monkeypatch.setattr(LinkServer, "_drop", drop)
    found = names_of(asyncio.run(left_by(len(ENDS), warm_up=len(ENDS))))
    assert {"hub._traces._ranks", "hub._router._admission._waiting", "links._links"} <= set(found), found

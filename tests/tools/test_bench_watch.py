"""What watching costs: figures of hand-made rounds, and a watcher that does not hide that it failed."""

from __future__ import annotations

import asyncio

import pytest

from qwen3vl_disagg.core.errors import InputError
from tools import bench_watch
from tools.bench_watch import ALONE, CONTROL, WATCHED, ratio, report, watched, what_watching_costs


def test_rounds_are_compared_with_their_neighbours():
    """The machine's speed halves between the rounds; the ratios do not see it."""
    alone = [{"tokens/s": 100.0}, {"tokens/s": 50.0}, {"tokens/s": 40.0}]
    beside = [{"tokens/s": 99.0}, {"tokens/s": 48.0}, {"tokens/s": 42.0}]
    found = {ALONE: alone, CONTROL: alone, WATCHED: beside}
    ratios = {name: {"tokens/s": ratio(found, "tokens/s", name)} for name in (CONTROL, WATCHED)}
    assert ratios[WATCHED]["tokens/s"] == pytest.approx({"median": 0.99, "least": 0.96, "most": 1.05})
    machine = {"cpu": "c", "cores": 2, "torch": "t", "date": "d", "load": []}
    said = report({"machine": machine, "model": "m", "rounds": 3, "servers": found, "ratios": ratios})
    assert "| watched | 48.00 |" in said
    assert "| watched / alone, median of rounds | 0.990 (0.960 .. 1.050) |" in said


def test_a_watcher_that_fails_ends_the_measurement(monkeypatch):
    async def broken(port, told):
        raise ConnectionError("nobody there")

    async def forever():
        await asyncio.sleep(3600)

    monkeypatch.setattr(bench_watch, "watch", broken)
    monkeypatch.setattr(bench_watch.asyncio, "to_thread", lambda *_: forever())

    async def run():
        async with watched(1):
            await asyncio.sleep(0.05)

    with pytest.raises(RuntimeError, match="gave up"):
        asyncio.run(run())


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"texts": 0}, {"seconds": 0.0}, {"tokens": 0}])
def test_what_measures_nothing_is_refused(wrong):
    with pytest.raises(InputError):
        what_watching_costs(**wrong)

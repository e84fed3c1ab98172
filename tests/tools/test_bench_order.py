"""The two orders of serving: the mix of requests, and figures from hand-made times."""

from __future__ import annotations

import asyncio

import pytest

from qwen3vl_disagg.core.errors import InputError
from tools import bench_order
from tools.bench_order import LARGE, capacity, first_tokens, kinds, order, report, summary


def test_a_share_is_large_and_the_same_for_a_seed():
    mixed = kinds(200, 0.1, 3)
    assert mixed.count(LARGE) == 20
    assert mixed == kinds(200, 0.1, 3) != kinds(200, 0.1, 4)
    assert (kinds(3, 0.1, 0).count(LARGE), kinds(1, 0.1, 0), kinds(0, 0.1, 0)) == (1, [LARGE], [])


def test_figures_and_their_ratios():
    before = {"small": [100.0, 300.0, 200.0], "large": [1000.0, 3000.0]}
    after = {"small": [50.0, 150.0, 100.0], "large": [2000.0, 3000.0]}
    machine = {"cpu": "c", "cores": 2, "torch": "t", "date": "d", "load": [0.0]}
    orders = {"first come": summary(before), "as due": summary(after)}
    assert orders["first come"] == {
        "small mean": 200.0,
        "small p50": 200.0,
        "small p99": 300.0,
        "large mean": 2000.0,
        "large p50": 1000.0,
        "large p99": 3000.0,
        "longest": 3000.0,
    }
    result = {"machine": machine, "model": "m", "server": "one", "rounds": 1, "requests_s": 2.0, "orders": orders}
    assert "| ratio | 0.50 | 0.50 | 0.50 | 1.25 | 2.00 | 1.00 | 1.00 |" in report(result)


def test_requests_come_at_their_times_and_first_tokens_are_told_in_their_order(monkeypatch):
    """An answer takes 0.2 s for `slow`; the next does not wait for it."""

    async def send(port, request, stream):
        loop = asyncio.get_running_loop()
        began.append(loop.time())
        await asyncio.sleep(0.2 if request == b"slow" else 0.0)
        stream.stamps.append(stream.sent + (0.2 if request == b"slow" else 0.01))

    began: list[float] = []
    monkeypatch.setattr(bench_order, "send", send)
    found = asyncio.run(first_tokens(1, [0.0, 0.05], [b"slow", b"quick"]))
    assert found == pytest.approx([200.0, 10.0])
    assert 0.03 < began[1] - began[0] < 0.15
    rate = asyncio.run(capacity(1, [b"slow"] * 4, 2))
    assert 5 < rate <= 10.1


@pytest.mark.parametrize("options", [{"rounds": 0}, {"share": 0.0}, {"load": 0.0}, {"rate": 0.0}, {"rate": 1e-9}])
def test_what_cannot_be_measured_is_said(options):
    with pytest.raises(InputError):
        order(**options)

"""A burst of images: waits and figures from hand-made times, what is drawn of what ranks told, and the picture."""

from __future__ import annotations

import asyncio

import pytest

from qwen3vl_disagg.core.errors import InputError
from tools import bench_burst
from tools.bench_burst import Bar, bars, burst_of_images, draw, figures, report, waits, watch


def test_waits_are_those_before_each_token_of_a_text():
    """Two texts; time 0 is at 10 s on the clock of the stamps."""
    found = waits([[9.0, 9.5, 10.25], [9.9, 10.1]], zero=10.0)
    assert [at for at, _ in found] == pytest.approx([-0.5, 0.1, 0.25])
    assert [ms for _, ms in found] == pytest.approx([500, 200, 750])


def test_figures_count_what_came_before_the_images_and_while_they_were_answered():
    found = [(-1.0, 10.0), (-0.5, 30.0), (0.0, 40.0), (1.0, 90.0), (2.0, 50.0), (2.1, 900.0)]
    values = figures(found, [400.0, 100.0, 300.0], stop=2.0)
    assert values == {
        "quiet gap p99": 30.0,
        "gap p50": 50.0,
        "gap p99": 90.0,
        "longest gap": 90.0,
        "text tokens/s": 1.5,
        "first token p50": 300.0,
        "seconds": 2.0,
    }
    with pytest.raises(RuntimeError, match="no token"):
        figures(found[2:], [1.0], stop=2.0)
    result = {"machine": {"cpu": "c", "cores": 2, "torch": "t", "date": "d", "load": []}, "model": "m"}
    assert "| split | 30 | 50 | 90 | 90 | 2 | 300 | 2 |" in report({**result, "servers": {"split": values}})


def test_bars_are_the_spans_that_have_a_lane_on_the_clock_of_the_images():
    span = ["encode", "tower", 12.0, 12.5, ["a"], [["a", 0]], {"rows": 4}]
    other = ["take part", "engine", 12.0, 12.1, [], [], {}]
    told = [{"spans": [["encode rank 0", span]]}, {"spans": [["language rank 1", other]]}]
    assert bars(told, zero=11.0) == [Bar("encode", 1.0, 1.5, ["a"])]


def test_a_look_asks_for_what_is_new_and_the_last_one_comes_at_the_end(monkeypatch):
    asked: list[int] = []

    def live(port, after):
        asked.append(after)
        return {"next": after + 3, "spans": []}

    async def look_twice():
        told: list[dict] = []
        task = asyncio.create_task(watch(1, told))
        while len(told) < 2:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return told

    monkeypatch.setattr(bench_burst, "_live", live)
    monkeypatch.setattr(bench_burst, "LOOK_S", 0.01)
    told = asyncio.run(look_twice())
    assert len(told) >= 3
    assert asked == list(range(0, 3 * len(told), 3))


def test_the_picture_has_a_lane_and_a_wait_for_each_server(tmp_path):
    pytest.importorskip("matplotlib")
    found = [(-0.5, 30.0), (0.5, 40.0)]
    done = [Bar("encode", 0.1, 0.3, ["a", "b"]), Bar("prefill", 0.3, 0.4, ["a"]), Bar("decode", 0.0, 0.1, ["t"])]
    run = (figures(found, [100.0], stop=1.0), found, done)
    draw(tmp_path / "burst.svg", {"split": run, "one": run}, "a machine")
    drawn = (tmp_path / "burst.svg").read_text()  # words are in it as comments
    for words in ("encode rank: encode", "language rank: decode", "longest wait 40 ms"):
        assert drawn.count(words) == 2, words


@pytest.mark.parametrize("options", [{"servers": ("two",)}, {"servers": ()}, {"images": 0}, {"quiet_seconds": 0.0}])
def test_what_cannot_be_measured_is_said(options):
    with pytest.raises(InputError):
        burst_of_images(**options)

"""The gaps benchmark: the load it makes and what it says of it."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from tools.bench_gaps import Load, draw, merge, report, tail, within
from tools.bench_load import LoadError, Stream, arrivals, body, picture, take, text

LOAD = Load(texts=2, text_tokens=9, images=3, image_tokens=4, side=64, seconds=5, quiet_s=1, rate=2.0, seed=1)


def test_arrivals_come_from_the_seed_at_the_rate():
    times = arrivals(5.0, 1000.0, 3)
    assert times == arrivals(5.0, 1000.0, 3) != arrivals(5.0, 1000.0, 4)
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 1000
    assert 4750 < len(times) < 5250
    with pytest.raises(ValueError, match=r"0 requests/s"):
        arrivals(0, 1, 0)


def test_no_two_contents_are_alike():
    bodies = {LOAD.image_body(number) for number in range(4)} | {LOAD.text_body(number) for number in range(4)}
    assert len(bodies) == 8
    images = [
        part["image_url"]["url"]
        for number in range(4)
        for part in json.loads(LOAD.image_body(number))["messages"][0]["content"]
        if part["type"] == "image_url"
    ]
    assert len(set(images)) == len(images) == 12
    assert text(7, 1) == text(7, 1) != text(7, 2)
    assert len(text(7, 1).split()) == 7


def test_a_picture_has_its_size():
    uri = picture(96, 5)
    data = base64.b64decode(uri.partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (96, 96)


def test_a_body_asks_for_tokens_that_do_not_end():
    request = json.loads(body("hi", ["data:x"], 7, stream=False))
    assert (request["max_tokens"], request["ignore_eos"], request["stream"]) == (7, True, False)
    assert [part["type"] for part in request["messages"][0]["content"]] == ["image_url", "text"]


def test_events_of_a_stream():
    stream = Stream(0.0)
    take(b'{"choices": [{"delta": {"role": "assistant"}}]}', stream)
    assert stream.stamps == []
    take(b'{"choices": [{"delta": {"content": ""}, "token_ids": [4]}]}', stream)
    take(b'{"choices": [{"delta": {"content": "ab"}, "token_ids": [4, 5]}]}', stream)
    take(b'{"choices": [], "timings": {"encode": 3.0}}', stream)
    assert (len(stream.stamps), stream.finished, stream.timings) == (3, 0.0, {"encode": 3.0})
    assert stream.first_token_s == stream.stamps[0]
    with pytest.raises(LoadError, match="too much"):
        take(b'{"error": {"message": "too much"}}', stream)
    take(b"[DONE]", stream)
    assert stream.finished > 0


def test_only_what_comes_within_the_window_counts():
    assert within([1.0, 2.0, 3.0, 4.0], 2.0, 3.5) == [2.0, 3.0]


def some_round(scale: float):
    return {
        "gaps_ms": [scale * value for value in range(1, 101)],
        "quiet_gaps_ms": [scale, scale],
        "first_token_ms": [],
        "requests": 3,
        "requests_s": scale,
        "text_tokens_s": 2 * scale,
        "seconds": 5.0,
        "text_requests_ended": 1,
        "cores": {"encode": 0.5 * scale},
        "machine_cores": 1.0,
    }


def test_rounds_are_pooled():
    merged = merge([some_round(1.0), some_round(3.0)])
    assert merged["gaps_ms"] == {"p50": 75, "p99": 294, "max": 300, "count": 200}
    assert merged["first_token_ms"] == {"count": 0}
    assert (merged["requests"], merged["requests_s"], merged["text_tokens_s"]) == (6, 2.0, 4.0)
    assert merged["cores"] == {"encode": 1.0}
    assert [one["gaps_ms"]["max"] for one in merged["rounds"]] == [100, 300]
    assert tail([2.0]) == {"p50": 2.0, "p99": 2.0, "max": 2.0, "count": 1}


def test_the_report_says_when_texts_ended_early(tmp_path):
    result = {
        "machine": {"cpu": "a CPU", "cores": 2, "torch": "x", "date": "today", "load": [0, 0, 0]},
        "model": "m",
        "texts": 2,
        "images": 3,
        "image_side": 64,
        "seconds": 5.0,
        "rounds": 1,
        "rate": 2.0,
        "systems": {"split": merge([some_round(1.0)])},
    }
    said = report(result)
    assert "| split | 50 | 99 | 100 | 1 | 1 | 1 | - | - | 1.000 | 2.0 |" in said
    assert "1 text requests of `split` ended" in said
    assert draw({"split": [1.0, 20.0, 5.0], "colocated": [3.0]}, tmp_path / "new").stat().st_size > 10_000

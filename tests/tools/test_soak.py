"""The long run: figures of hand-made samples, and requests of which no two are alike."""

from __future__ import annotations

import json

import pytest

from tools import soak
from tools.chaos_parts.growth import Sample
from tools.soak import HOT, KINDS, Seen, body_of, growth, latency


def samples(name: str, mib: list[float], descriptors: int = 10) -> list[Sample]:
    return [Sample(float(10 * i), name, 1, 1, int(m * 2**20), descriptors, 3) for i, m in enumerate(mib)]


def test_growth_is_that_of_the_second_half():
    """100 s, 50,000 requests: the first half warms up; then a MiB every 10 s is 10 in 50,000, 20 in 100,000."""
    held = [100.0, 200.0, 300.0, 400.0, 500.0, 500.0, 501.0, 502.0, 503.0, 504.0]
    found = growth(samples("frontend", held) + samples("slots and children", held), 50_000, 100.0)
    assert list(found) == ["frontend"]
    assert found["frontend"]["MiB for 100,000"] == pytest.approx(20.0)
    assert found["frontend"]["MiB"] == 504.0
    assert found["frontend"]["descriptors for 100,000"] == pytest.approx(0.0)


def test_no_two_requests_are_alike_and_hot_pictures_come_again():
    pictures = [f"p{i}" for i in range(100)]
    urls = []
    for number in range(300):
        parts = json.loads(body_of("repeated image", number, pictures, 4))["messages"][0]["content"]
        urls.append(parts[0]["image_url"]["url"])
    assert set(urls) == {f"p{i}" for i in range(HOT)}
    bodies = {body_of(kind, number, pictures, 4) for kind in KINDS for number in range(50)}
    assert len(bodies) == len(KINDS) * 50 - 50  # a hang-up asks as an image does
    assert "image_url" not in body_of("text", 3, pictures, 4).decode()


def test_the_last_thousand_is_compared_with_the_second(monkeypatch):
    monkeypatch.setattr(soak, "THOUSAND", 2)
    found = latency([9.0, 9.0, 1.0, 1.0, 5.0, 2.0, 2.0])
    assert found == {"second thousand": {"p50": 1000, "p99": 1000}, "last thousand": {"p50": 2000, "p99": 2000}}


def test_each_request_is_sent_once():
    seen = Seen()
    assert [seen.begin(3) for _ in range(5)] == [0, 1, 2, None, None]
    seen.end("text", 200, 0.5)
    seen.end("text", 503, 0.5)
    assert seen.seconds == [0.5]

"""Overload: refusals are counted, who obeys Retry-After is answered, and the figures are those of hand-made runs."""

from __future__ import annotations

import asyncio
import itertools
import os
import time

import pytest

from qwen3vl_disagg.core.errors import InputError
from tools import bench_overload
from tools.bench_load import refusal
from tools.bench_overload import Seen, ask_once, ask_until_answered, overload, overloaded, report

ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    b'data: {"choices": [{"index": 0, "token_ids": [1], "delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n'
)
REFUSED = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\nContent-Length: 2\r\n\r\n{}"


class Busy:
    """Refuses so many requests, and answers what follows; a number of times for each connection to come."""

    def __init__(self, *replies: bytes) -> None:
        self._replies = list(replies)
        self.times: list[float] = []

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self._server.sockets[0].getsockname()[1]

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.times.append(time.monotonic())
        writer.write(self._replies.pop(0) if len(self._replies) > 1 else self._replies[0])
        await writer.drain()
        writer.close()


def test_what_a_refusal_says():
    error = refusal("HTTP/1.1 429 Too Many Requests", "Retry-After: 7\r\n\r\n{}")
    assert (error.status, error.retry_after_s) == ("429", 7.0)
    assert refusal("HTTP/1.1 400 Bad Request", "\r\n").retry_after_s is None
    assert refusal("", "").status == ""


def test_who_asks_once_is_counted_by_status():
    async def run() -> Seen:
        seen = Seen()
        async with Busy(REFUSED, ANSWER, ANSWER.partition(b"data: [DONE]")[0]) as port:
            for _ in range(3):
                await ask_once(port, b"{}", seen)
        return seen

    seen = asyncio.run(run())
    assert seen.ends == {"429": 1, "200": 1, "broken off": 1}
    assert len(seen.seconds) == len(seen.first_s) == len(seen.finished) == 1


def test_who_obeys_waits_as_long_as_it_is_told():
    async def run() -> tuple[tuple[int, float] | None, list[float]]:
        busy = Busy(REFUSED, REFUSED, ANSWER)
        async with busy as port:
            return await ask_until_answered(port, b"{}"), busy.times

    found, times = asyncio.run(run())
    assert found is not None
    assert found[0] == 3
    assert all(0.95 <= b - a < 1.5 for a, b in itertools.pairwise(times))


def test_an_overload_is_counted_whole(monkeypatch):
    monkeypatch.setattr(bench_overload, "names_of", lambda _: {os.getpid(): "frontend"})
    monkeypatch.setattr(bench_overload, "PATIENT_S", 0.5)

    async def run() -> dict:
        async with Busy(REFUSED, ANSWER) as port:
            return await overload(port, lambda *_: b"{}", rate=20.0, seconds=2.0, tokens=1)

    found = asyncio.run(run())
    assert found["ends"].get("200", 0) + found["ends"].get("429", 0) == found["arrived"] > 10
    assert found["patient"]["clients"] == found["patient"]["answered"] == 3
    answered = found["ends"]["200"] + 3
    assert (answered - 3) / 2 <= found["requests_s"] <= answered / 2
    machine = {"cpu": "c", "cores": 2, "torch": "t", "date": "d", "load": []}
    more = {"model": "m", "times": 3, "wall_s": 2, "capacity_s": [4.0, 6.0], "goodput": 0.95}
    said = report({"machine": machine, **more, **found})
    assert "| of what it can | 0.950 |" in said
    assert "3 of 3" in said


@pytest.mark.parametrize("wrong", [{"at_once": 0}, {"seconds": 0.0}, {"times": 0.0}, {"tokens": 0}])
def test_what_measures_nothing_is_refused(wrong):
    with pytest.raises(InputError):
        overloaded(**wrong)

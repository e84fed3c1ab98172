"""`GET /debug/trace`: what all ranks did lately, in the form of Chrome's traces, which Perfetto reads, too. And
`GET /debug/live`, the same and what ranks have to do, for the page that shows it.

An answer is up to tens of megabytes and a second of work. One is made at a time, on a thread; few may wait for theirs,
or have not read them yet, and an answer is sent as it is read, so that the whole of it is here once.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import msgspec
from msgspec import structs
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwen3vl_disagg.cluster.backend import Backend
from qwen3vl_disagg.cluster.registry import RankKey
from qwen3vl_disagg.cluster.traces import DRIFT, FRESH_S, MAX_SPANS, Watched
from qwen3vl_disagg.core.errors import InputError, OverloadedError
from qwen3vl_disagg.core.spans import Span
from qwen3vl_disagg.serving.metrics import Metrics

TRACE_PATH, LIVE_DATA_PATH = "/debug/trace", "/debug/live"
SECONDS, MAX_SECONDS = 30.0, 600.0
LIVE_S = 30.0
MAX_LIVE = 20_000
"""Spans in an answer to the page."""
MAX_BODY, PART = 32 * 2**20, 64 * 2**10
MAX_HERE = 8
"""Requests of both routes that wait for their answer or have not read it."""


class Tracing:
    """The two routes. Where hits are hidden they are closed: an image that was not encoded was there already."""

    def __init__(self, backend: Backend, metrics: Metrics, *, hides_cache_hits: bool) -> None:
        self._backend, self._metrics, self._hides = backend, metrics, hides_cache_hits
        self._frontend = secrets.token_hex(8)
        """Numbers of spans are this process's."""
        self._making, self._num_here = asyncio.Lock(), 0
        self._last: tuple[float, float, bytes] | None = None
        """Of the traces: its seconds, until when it is good, and the body."""

    async def trace(self, request: Request) -> Response:
        """The last `seconds`, as a file."""
        self._check()
        seconds = _number(request, "seconds", SECONDS, MAX_SECONDS)
        if not seconds:
            raise InputError("seconds: must be more than 0", param="seconds")

        async def make() -> bytes:
            if self._last is None or self._last[0] != seconds or time.monotonic() >= self._last[1]:
                watched = await self._backend.spans()
                most = min(MAX_SPANS, len(watched.spans))
                body = await asyncio.to_thread(_fitting, partial(chrome_trace, watched, seconds), most)
                self._last = seconds, time.monotonic() + FRESH_S, body
                asyncio.get_running_loop().call_later(FRESH_S, self._forget, body)
            return self._last[2]

        response = await self._answer(make)
        response.headers["Content-Disposition"] = 'attachment; filename="trace.json"'
        return response

    def _forget(self, body: bytes) -> None:
        if self._last is not None and self._last[2] is body:
            self._last = None

    async def live(self, request: Request) -> Response:
        """What is new from the number `after` on, which the answer before had as `next`."""
        self._check()
        after = _number(request, "after", 0.0, 2.0**53)

        async def make() -> bytes:
            watched, loads = await self._backend.spans(int(after)), dict(self._backend.rank_loads())
            hits = dict(self._metrics.hits)
            return await asyncio.to_thread(
                _fitting, lambda most: {**live(watched, loads, hits, most), "frontend": self._frontend}, MAX_LIVE
            )

        return await self._answer(make)

    async def _answer(self, make: Callable[[], Awaitable[bytes]]) -> Response:
        """OverloadedError where too many are here."""
        if self._num_here >= MAX_HERE:
            raise OverloadedError("too many ask what the ranks do, or do not read what they have asked for")
        self._num_here += 1
        try:
            async with self._making:
                body = await make()
        except BaseException:
            self._leave()
            raise
        return _Parts(body, self._leave)

    def _leave(self) -> None:
        self._num_here -= 1

    def _check(self) -> None:
        if self._hides:
            message = "with --hide-cache-hits the server does not show what its ranks do"
            raise InputError(message, status=403, code="hidden")


class _Parts(Response):
    """Sent as it is read; `when_sent` is called when that is over, also where the client has left."""

    media_type = "application/json"

    def __init__(self, body: bytes, when_sent: Callable[[], None]) -> None:
        super().__init__(body)
        self._when_sent = when_sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, len(self.body), PART):
                part = self.body[start : start + PART]
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._when_sent()


def _fitting(make: Callable[[int], dict[str, Any]], most: int) -> bytes:
    """JSON of what `make` makes of at most so many spans, the newest; fewer where it were too large."""
    while len(body := msgspec.json.encode(make(most))) > MAX_BODY and most:
        most = most * 9 // 10 * MAX_BODY // len(body)
    return body


def _number(request: Request, name: str, default: float, most: float) -> float:
    """Of the query. InputError for what is none, is negative or more than `most`, and for two of them."""
    given = request.query_params.getlist(name)
    if not given:
        return default
    try:
        [value] = (float(text) for text in given if "_" not in text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise InputError(f"{name}: must be one number from 0 to {most:.0f}", param=name)
    return value


def live(watched: Watched, loads: dict[RankKey, Any], hits: dict[str, int], most: int) -> dict[str, Any]:
    """What the page draws; times in seconds, on the frontend's clock. A rank that is missing has no load. `lost`: spans
    from `after` on that the frontend had no room for, `left_out`: that the answer has none for, and of a rank, that it
    had none for, where some of these are of the seconds that are shown."""
    oldest = watched.now - LIVE_S
    spans = [(_name(key), one) for key, one in watched.spans if one.stop >= oldest]
    lost = {key: count for key, (count, since) in watched.lost.items() if since >= oldest}
    ranks = [
        {
            "name": _name(key),
            "load": None if load is None else structs.asdict(load),
            "silent": key in watched.silent,
            "lost": lost.get(key, 0),
        }
        for key, load in loads.items()
    ]
    num_left_out = max(0, len(spans) - most)
    told = {"now": watched.now, "next": watched.next, "lost": watched.num_gone, "left_out": num_left_out}
    return {**told, "hits": hits, "ranks": ranks, "spans": spans[num_left_out:]}


def _name(key: RankKey) -> str:
    return f"{key[0]} rank {key[1]}"


# ---- Chrome's form ----


def chrome_trace(watched: Watched, seconds: float, most: int = MAX_SPANS) -> dict[str, Any]:
    """A process for each rank, a lane for each of its threads, an arrow from each encoding to the prefill that first
    uses its rows. Spans that reach into the last `seconds`, the newest `most` of them; times in microseconds since
    these began, or the first of them did."""
    spans = [(key, one) for key, one in watched.spans if one.stop >= watched.now - seconds]
    num_left_out = max(0, len(spans) - most)
    spans = spans[num_left_out:]
    zero = min([watched.now - seconds, *(one.start for _, one in spans)])
    keys = sorted({*watched.clocks, *(key for key, _ in spans)})
    processes = {key: number for number, key in enumerate(keys, 1)}
    lanes = {lane: number for number, lane in enumerate(sorted({(key, one.lane) for key, one in spans}), 1)}
    events: list[dict[str, Any]] = []
    for key, pid in processes.items():
        events += [_meta(pid, 0, "process_name", name=_name(key)), _meta(pid, 0, "process_sort_index", sort_index=pid)]
    for (key, lane), tid in lanes.items():
        events.append(_meta(processes[key], tid, "thread_name", name=lane))

    def at(key: RankKey, one: Span, seconds: float) -> dict[str, Any]:
        return {"pid": processes[key], "tid": lanes[key, one.lane], "ts": round((seconds - zero) * 1e6, 3)}

    for key, one in spans:
        args: dict[str, Any] = {"requests": one.requests, **one.numbers}
        if len(one.requests) == 1:
            args["request_id"] = one.requests[0]
        if one.items:
            args["items"] = [f"{request_id} item {item}" for request_id, item in one.items]
        duration = max(0.0, round((one.stop - one.start) * 1e6, 3))
        event = {"ph": "X", "name": one.name, "cat": key[0], **at(key, one, one.start), "dur": duration}
        events.append({**event, "args": args})
    for number, ((key, encode), (to, prefill)) in enumerate(_uses(spans), 1):
        arrow = {"name": "rows", "cat": "rows", "id": number}
        events.append({"ph": "s", **arrow, **at(key, encode, (encode.start + encode.stop) / 2)})
        events.append({"ph": "f", "bp": "e", **arrow, **at(to, prefill, prefill.start)})
    notes = _notes(watched, seconds, zero)
    if num_left_out:
        notes["left out"] = f"the first {num_left_out} spans of these seconds: the file would be too large"
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": notes}


def _meta(pid: int, tid: int, what: str, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": what, "args": args}


def _uses(spans: list[tuple[RankKey, Span]]) -> Iterator[tuple[tuple[RankKey, Span], tuple[RankKey, Span]]]:
    """Each encoding with the first prefill after it that uses rows of the same item, for each of its items."""
    prefills: dict[tuple[str, int], list[tuple[RankKey, Span]]] = {}
    for entry in sorted(spans, key=lambda entry: entry[1].start):
        if entry[1].name == "prefill":
            for item in entry[1].items:
                prefills.setdefault(item, []).append(entry)
    for entry in spans:
        if entry[1].name == "encode":
            for item in entry[1].items:
                # By their ends: clocks of two hosts may be off by more than the transfer took.
                using = next((other for other in prefills.get(item, ()) if other[1].stop > entry[1].stop), None)
                if using is not None:
                    yield entry, using


def _notes(watched: Watched, seconds: float, zero: float) -> dict[str, Any]:
    """What there is to know of the numbers, in words where there is anything."""
    notes: dict[str, Any] = {"seconds": seconds, "zero_unix_s": round(time.time() - (time.monotonic() - zero), 6)}
    for key, clock in sorted(watched.clocks.items()):
        if 0 < clock.error_s < math.inf:  # before its first answer nothing is known, and nothing shown
            name, error_s = f"clock of {_name(key)}", clock.error_s + DRIFT * max(0.0, clock.at - zero)
            notes[name] = f"another host's: estimated, off by {error_s * 1e3:.3f} ms at most"
    for key, (count, since) in sorted(watched.lost.items()):
        if since > zero:
            notes[f"dropped by {_name(key)}"] = f"spans before {(since - zero) * 1e6:.0f} us: no room ({count} so far)"
    if watched.num_gone and watched.spans and watched.spans[0][1].stop > zero:
        notes["dropped by the frontend"] = f"the first of them: no room ({watched.num_gone} so far)"
    if watched.silent:
        notes["not heard"] = ", ".join(_name(key) for key in sorted(watched.silent))
    return notes

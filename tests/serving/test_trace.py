"""What ranks did, over HTTP: Chrome's form, what the page reads, and who may see it."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
import socket
import subprocess
import time
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from qwen3vl_disagg.cluster.traces import Clock, Watched
from qwen3vl_disagg.core.errors import OverloadedError
from qwen3vl_disagg.core.requests import ItemTimings, RequestTimings
from qwen3vl_disagg.core.spans import Span
from qwen3vl_disagg.protocol.messages import EncodeLoad, LanguageLoad
from qwen3vl_disagg.serving import trace
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.limits import Limits
from qwen3vl_disagg.serving.metrics import Metrics
from qwen3vl_disagg.serving.trace import MAX_HERE, Tracing
from qwen3vl_disagg.serving.ui import LIVE_PATH
from tests.support.asgi import is_on_a_loop
from tests.support.fake_backend import FakeBackend, serve, tiny_processor
from tests.support.running import RunningApp, wait_for

E0, E1, L2 = ("encode", 0), ("encode", 1), ("language", 2)
NOW = 1_000.0


def spans() -> list[tuple[tuple[str, int], Span]]:
    """A request `a-1` with two images, of which the second is encoded beside the decode steps of `a-0`; an old one."""
    return [
        (E0, Span("encode", "tower_0", NOW - 40, NOW - 39, ["a-9"], [("a-9", 0)], {"images": 1})),
        (E0, Span("preprocess", "decode-images_0", NOW - 9.0, NOW - 8.5, ["a-1"], [("a-1", 0)])),
        (E0, Span("encode", "tower_0", NOW - 8.5, NOW - 7.5, ["a-1"], [("a-1", 0)], {"images": 1})),
        (L2, Span("prefill", "engine", NOW - 7.4, NOW - 7.0, ["a-1"], [("a-1", 0)], {"tokens": 30})),
        (L2, Span("decode", "engine", NOW - 7.0, NOW - 6.9, ["a-0"], [], {"tokens": 1})),
        (E1, Span("encode", "tower_0", NOW - 8.0, NOW - 6.5, ["a-1"], [("a-1", 1)], {"images": 1})),
        (L2, Span("prefill", "engine", NOW - 6.4, NOW - 6.0, ["a-1", "a-2"], [("a-1", 1)], {"tokens": 20})),
        (L2, Span("prefill", "engine", NOW - 6.0, NOW - 5.9, ["a-1"], [("a-1", 1)], {"tokens": 5})),
    ]


@pytest.fixture
def backend() -> FakeBackend:
    backend = FakeBackend()
    clocks = {E0: Clock(), E1: Clock(3.0, 0.002), L2: Clock()}
    backend.watched = Watched(now=NOW, next=8, spans=spans(), clocks=clocks, lost={L2: (50, NOW - 9.5)}, silent=[E1])
    language = LanguageLoad(running=2, waiting=1, kv_pages_used=3, kv_pages=10)
    backend.loads = {E0: EncodeLoad(running=1), E1: None, L2: language}
    return backend


def check_form(made: dict[str, Any]) -> list[dict[str, Any]]:
    """By the document "Trace Event Format": what Perfetto and chrome://tracing need of each event."""
    events = made["traceEvents"]
    for event in events:
        assert event["ph"] in "XMsf"
        assert isinstance(event["name"], str)
        assert all(isinstance(event[name], int) for name in ("pid", "tid"))
        assert isinstance(event["ts"], (int, float))
        assert ("dur" in event) is (event["ph"] == "X")
        assert event["ph"] != "X" or event["dur"] >= 0
        assert ("id" in event) is (event["ph"] in "sf")
    for arrow in [event for event in events if event["ph"] in "sf"]:  # they end in boxes, or are not drawn
        assert any(
            box["ph"] == "X"
            and (box["pid"], box["tid"]) == (arrow["pid"], arrow["tid"])
            and box["ts"] <= arrow["ts"] <= box["ts"] + box["dur"]
            for box in events
        )
    for tid in {event["tid"] for event in events if event["ph"] == "X"}:
        boxes = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == tid)
        assert all(after[0] >= before[1] - 0.01 for before, after in itertools.pairwise(boxes))
    return events


def test_it_is_chromes_form_with_a_process_for_each_rank_and_microseconds(backend):
    reply = serve(backend).get("/debug/trace?seconds=10")
    assert reply.status_code == 200
    assert "trace.json" in reply.headers["content-disposition"]
    made = reply.json()
    events = check_form(made)
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(names.values()) == ["encode rank 0", "encode rank 1", "language rank 2"]
    lanes = {(names[e["pid"]], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert ("encode rank 0", "decode-images_0") in lanes
    boxes = [e for e in events if e["ph"] == "X"]
    assert len(boxes) == 7, "what ended before is left out"
    [first] = [e for e in boxes if e["name"] == "preprocess"]
    assert (first["ts"], first["dur"]) == pytest.approx((1e6, 0.5e6))
    assert first["args"] == {"requests": ["a-1"], "request_id": "a-1", "items": ["a-1 item 0"]}
    [both] = [e for e in boxes if len(e["args"]["requests"]) == 2]
    assert both["args"]["tokens"] == 20


def test_an_arrow_leads_from_each_encoding_to_the_prefill_that_uses_it(backend):
    events = serve(backend).get("/debug/trace?seconds=10").json()["traceEvents"]
    starts, ends = ({e["id"]: e for e in events if e["ph"] == ph} for ph in "sf")
    assert starts.keys() == ends.keys()
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    arrows = sorted((names[starts[n]["pid"]], round(ends[n]["ts"] / 1e5), ends[n]["bp"]) for n in starts)
    assert arrows == [("encode rank 0", 26, "e"), ("encode rank 1", 36, "e")]


def test_no_arrow_leads_to_a_prefill_before_the_encoding(backend):
    """Rows that were dropped and made again were used before, too."""
    early = Span("prefill", "engine", NOW - 9.9, NOW - 9.8, ["a-1"], [("a-1", 0)])
    backend.watched.spans.insert(0, (L2, early))
    events = serve(backend).get("/debug/trace?seconds=10").json()["traceEvents"]
    assert sorted(round(e["ts"] / 1e5) for e in events if e["ph"] == "f") == [26, 36]
    backend.watched.spans = [entry for entry in spans() if entry[1].name != "prefill"] + [(L2, early)]
    events = serve(backend).get("/debug/trace?seconds=10").json()["traceEvents"]
    assert not [e for e in events if e["ph"] in "sf"]


def test_what_the_frontend_had_no_room_for_is_told(backend):
    backend.watched.num_gone = 12
    backend.watched.spans = spans()[1:]
    assert "12 so far" in serve(backend).get("/debug/trace?seconds=10").json()["otherData"]["dropped by the frontend"]
    backend.watched.spans = spans()
    notes = serve(backend).get("/debug/trace?seconds=10").json()["otherData"]
    assert "dropped by the frontend" not in notes, "that was before these seconds"


def test_how_far_a_clock_may_be_off_counts_from_when_it_was_estimated(backend):
    backend.watched.clocks = {E0: Clock(1.0, 0.002, NOW), E1: Clock(1.0, 0.002, NOW - 20), L2: Clock(0.0, float("inf"))}
    notes = serve(backend).get("/debug/trace?seconds=10").json()["otherData"]
    assert "3.000 ms" in notes["clock of encode rank 0"], "the first spans are 10 s older"
    assert "2.000 ms" in notes["clock of encode rank 1"]
    assert "clock of language rank 2" not in notes, "nothing is known"


def test_what_is_to_know_of_the_numbers_stands_beside_them(backend):
    notes = serve(backend).get("/debug/trace?seconds=10").json()["otherData"]
    assert notes["seconds"] == 10
    assert "2.000 ms" in notes["clock of encode rank 1"]
    assert "clock of encode rank 0" not in notes
    assert notes["not heard"] == "encode rank 1"
    assert "before 500000 us" in notes["dropped by language rank 2"]
    short = serve(backend).get("/debug/trace?seconds=9").json()["otherData"]
    assert "dropped by language rank 2" not in short, "in these seconds nothing is missing"


NONSENSE = ("0", "-1", "601", "nan", "inf", "x", "", "1_0", "1&seconds=2")


@pytest.mark.parametrize("query", [f"seconds={text}" for text in NONSENSE])
def test_nonsense_is_refused_by_name(backend, query):
    reply = serve(backend).get(f"/debug/trace?{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "seconds")


@pytest.mark.parametrize("query", ["after=-1", "after=x", "after=1e99", "after=1&after=2"])
def test_so_it_is_for_the_page(backend, query):
    reply = serve(backend).get(f"/debug/live?{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "after")
    assert backend.asked_after == []


@pytest.mark.parametrize("path", ["/debug/trace", "/debug/live"])
def test_it_needs_the_key_and_says_nothing_where_hits_are_hidden(backend, path):
    client = serve(backend, keys=ApiKeys(["secret"]))
    reply = client.get(path)
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert client.get(path, headers={"x-api-key": "secret"}).status_code == 200
    hidden = serve(backend, limits=Limits(hide_cache_hits=True)).get(path)
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (403, "hidden")
    assert client.post(path, headers={"x-api-key": "secret"}).status_code == 405


def test_times_are_never_negative_also_of_what_had_begun_before(backend):
    events = check_form(serve(backend).get("/debug/trace?seconds=7.7").json())
    boxes = {(e["name"], e["args"]["items"][0]): e["ts"] for e in events if e["ph"] == "X" and "items" in e["args"]}
    assert min(e["ts"] for e in events) == 0.0 == boxes["encode", "a-1 item 0"]
    assert boxes["prefill", "a-1 item 0"] == pytest.approx(1.1e6)


def test_without_ranks_there_is_nothing_and_that_is_a_trace():
    made = serve(FakeBackend()).get("/debug/trace").json()
    assert check_form(made) == []


def test_the_page_hears_what_is_new_and_what_ranks_have_to_do(backend):
    told = serve(backend).get("/debug/live?after=5").json()
    assert backend.asked_after == [5]
    assert (told["now"], told["next"], told["lost"]) == (NOW, 8, 0)
    ranks = {rank["name"]: rank for rank in told["ranks"]}
    assert ranks["encode rank 1"] == {"name": "encode rank 1", "load": None, "silent": True, "lost": 0}
    assert ranks["language rank 2"]["lost"] == 50
    assert ranks["language rank 2"]["load"]["kv_pages_used"] == 3
    assert len(told["spans"]) == 7, "older than the page shows"
    first = told["spans"][0]
    assert first == ["encode rank 0", ["preprocess", "decode-images_0", 991.0, 991.5, ["a-1"], [["a-1", 0]], {}]]


def test_the_page_hears_no_more_at_once_than_it_can_draw(backend, monkeypatch):
    monkeypatch.setattr(trace, "MAX_LIVE", 3)
    told = serve(backend).get("/debug/live").json()
    assert (len(told["spans"]), told["left_out"], told["lost"]) == (3, 4, 0)
    assert told["spans"][-1][1][3] == NOW - 5.9


def test_the_page_hears_of_what_was_lost_in_the_seconds_that_it_shows(backend):
    backend.watched.num_gone = 9
    backend.watched.lost = {E0: (70, NOW - 31), L2: (50, NOW - 29)}
    told = serve(backend).get("/debug/live?after=1").json()
    assert told["lost"] == 9
    assert {rank["name"]: rank["lost"] for rank in told["ranks"]} == {
        "encode rank 0": 0,
        "encode rank 1": 0,
        "language rank 2": 50,
    }


def test_the_page_hears_which_frontend_it_is(backend):
    one, another = serve(backend), serve(backend)
    first, again, other = (client.get("/debug/live").json()["frontend"] for client in (one, one, another))
    assert first == again != other
    assert len(first) == 16


def test_an_answer_that_would_be_too_large_has_the_newest_and_tells_how_many_are_left_out(backend, monkeypatch):
    whole = serve(backend).get("/debug/trace?seconds=60")
    assert "left out" not in whole.json()["otherData"]
    monkeypatch.setattr(trace, "MAX_BODY", len(whole.content) - 1)
    reply = serve(backend).get("/debug/trace?seconds=60")
    assert len(reply.content) < len(whole.content)
    made = reply.json()
    boxes = [e for e in check_form(made) if e["ph"] == "X"]
    assert 0 < len(boxes) < 8
    newest = [e for e in whole.json()["traceEvents"] if e["ph"] == "X"][-len(boxes) :]
    assert [(e["name"], e["args"], e["dur"]) for e in boxes] == [(e["name"], e["args"], e["dur"]) for e in newest]
    assert made["otherData"]["left out"].startswith(f"the first {8 - len(boxes)} spans")
    told = serve(backend).get("/debug/live").json()
    assert (len(told["spans"]), told["left_out"]) == (7, 0), "this one is smaller"
    monkeypatch.setattr(trace, "MAX_BODY", 900)
    told = serve(backend).get("/debug/live").json()
    assert 0 < len(told["spans"]) < 7
    assert told["left_out"] == 7 - len(told["spans"])
    assert told["spans"][-1][1][3] == NOW - 5.9
    monkeypatch.setattr(trace, "MAX_BODY", 1)
    assert serve(backend).get("/debug/live").json()["spans"] == []


# ---- the brake ----


def asking(path: str) -> Request:
    return Request({"type": "http", "headers": [], "query_string": path.partition("?")[2].encode()})


@pytest.fixture
def tracing(backend) -> Tracing:
    return Tracing(backend, Metrics(backend), hides_cache_hits=False)


@pytest.fixture
def making(monkeypatch) -> list[int]:
    """How many traces were in the making as each of them began."""
    seen, now, make = list[int](), [0], trace.chrome_trace

    def slow(*args: Any) -> dict[str, Any]:
        assert not is_on_a_loop()
        now[0] += 1
        seen.append(now[0])
        time.sleep(0.02)
        now[0] -= 1
        return make(*args)

    monkeypatch.setattr(trace, "chrome_trace", slow)
    return seen


async def sent(response: Response, gate: asyncio.Event | None = None) -> int:
    """Send it to a client that reads when the gate opens; in how many parts it came."""
    parts = list[bytes]()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            parts.append(message["body"])
            if gate is not None:
                await gate.wait()

    await response({"type": "http"}, None, send)
    assert b"".join(parts) == response.body
    assert int(response.headers["content-length"]) == len(response.body)
    return len(parts)


def test_one_trace_is_made_at_a_time_and_once_for_all_who_ask_for_the_same_seconds(backend, tracing, making):
    async def scenario() -> None:
        same = await asyncio.gather(*[tracing.trace(asking("?seconds=10")) for _ in range(MAX_HERE)])
        assert (making, backend.asked_after) == ([1], [0])
        assert len({id(one.body) for one in same}) == 1, "it is here once"
        for one in same:
            await sent(one)
        others = await asyncio.gather(*[tracing.trace(asking(f"?seconds={n}")) for n in range(11, 11 + MAX_HERE)])
        assert making == [1] * (1 + MAX_HERE)
        assert [json.loads(one.body)["otherData"]["seconds"] for one in others] == [*range(11, 11 + MAX_HERE)]

    asyncio.run(scenario())


def test_a_trace_is_good_for_a_moment_and_then_forgotten(tracing, making, monkeypatch):
    monkeypatch.setattr(trace, "FRESH_S", 0.05)

    async def scenario() -> None:
        await sent(await tracing.trace(asking("?seconds=10")))
        await asyncio.sleep(0.1)
        assert tracing._last is None, "up to 32 MiB"
        await sent(await tracing.trace(asking("?seconds=10")))
        assert len(making) == 2

    asyncio.run(scenario())


def test_a_trace_is_not_told_later_also_if_it_was_not_forgotten(backend, making, monkeypatch):
    monkeypatch.setattr(trace, "FRESH_S", 0.05)
    client = serve(backend)  # each request has a loop of its own, which does nothing later
    for _ in range(2):
        assert client.get("/debug/trace?seconds=10").status_code == 200
        time.sleep(0.1)
    assert len(making) == 2


def test_of_a_body_that_nobody_reads_a_part_is_on_its_way(backend, tracing):
    backend.watched.spans = [(L2, Span("prefill", "engine", NOW - 5, NOW - 4, ["a" * 300]))] * 2_000

    async def scenario() -> None:
        response = await tracing.live(asking(""))
        assert await sent(response) == len(response.body) // 2**16 + 2

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["trace", "live"])
def test_few_wait_or_have_not_read_and_others_are_refused_until_these_are_gone(backend, tracing, path, monkeypatch):
    monkeypatch.setattr(trace, "PART", 100)

    async def scenario() -> None:
        ask, gate = getattr(tracing, path), asyncio.Event()
        readers = [asyncio.create_task(sent(await ask(asking("")), gate)) for _ in range(MAX_HERE)]
        await asyncio.sleep(0)
        for refused in (tracing.trace, tracing.live):
            with pytest.raises(OverloadedError):
                await refused(asking(""))
        readers[0].cancel()
        await asyncio.wait(readers[:1])
        assert await sent(await ask(asking(""))) > 3, "in parts"
        gate.set()
        await asyncio.gather(*readers[1:])

        async def fail(after: int = 0) -> Watched:
            raise ZeroDivisionError

        monkeypatch.setattr(backend, "spans", fail)
        tracing._forget(tracing._last[2] if tracing._last else b"")
        for _ in range(MAX_HERE + 1):
            with pytest.raises(ZeroDivisionError):
                await ask(asking(""))
        assert tracing._num_here == 0

    asyncio.run(scenario())


def test_the_refusal_is_as_others_are(backend, monkeypatch):
    monkeypatch.setattr(trace, "MAX_HERE", 0)
    for path in ("/debug/trace", "/debug/live"):
        reply = serve(backend).get(path)
        error = reply.json()["error"]
        assert (reply.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "overloaded")
        assert int(reply.headers["retry-after"]) >= 1
        described = serve(backend).get("/openapi.json").json()["paths"][path]["get"]["responses"]
        assert "Retry-After" in described["429"]["headers"]
        assert "--hide-cache-hits" in described["403"]["description"]


def test_who_does_not_read_has_a_place_until_it_leaves(backend, monkeypatch):
    monkeypatch.setattr(trace, "MAX_HERE", 1)
    many = [(L2, Span("prefill", "engine", NOW - 5, NOW - 4, ["a" * 300])) for _ in range(20_000)]
    backend.watched = Watched(now=NOW, spans=many)
    ask = b"GET /debug/live HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    with RunningApp(create_app(backend, tiny_processor(), model_name="tiny")) as running:
        with running.connect() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.sendall(ask)
            assert lazy.recv(12) == b"HTTP/1.1 200"
            assert running.raw(ask).startswith(b"HTTP/1.1 429")
        wait_for(lambda: running.raw(ask).startswith(b"HTTP/1.1 200"), 20.0)


# ---- the page ----

PLAYED = """
const asked = [], waiting = [];
const element = () => new Proxy(function () {}, {
  get: (_, name) => name === Symbol.toPrimitive ? () => "" : name === "then" ? undefined : element(),
  set: () => true, apply: () => element(), construct: () => element() });
const box = element();
globalThis.document = { getElementById: () => box, createElement: () => box, hidden: true };
globalThis.sessionStorage = { getItem: () => null };
globalThis.addEventListener = () => {};
globalThis.setTimeout = () => {};
globalThis.fetch = (url) => { asked.push(url); return new Promise((done) => waiting.push(done)); };
SCRIPT
draw = () => {}; view = () => {}; sums = () => {};
const tell = (told) => waiting.shift()({ ok: true, status: 200, json: async () => told });
const told = (frontend, next, number, lost = 0, left_out = 0) => ({ frontend, next, now: 1, lost, left_out, ranks: [],
  spans: Array(number).fill(["r", ["decode", "x", 0, 1, [], [], {}]]) });
const seen = [];
const round = async (answer) => {
  const both = [look(), look()];
  tell(answer);
  const said = await Promise.all(both);
  seen.push([said[0], spans.length, after, lost]);
};
(async () => {
  await round(told("a", 5, 5, 90, 1));
  await round(told("a", 7, 2, 3));
  await round(told("b", 900, 4));
  await round(told("b", 900, 4));
  console.log(JSON.stringify({ asked, seen }));
})();
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_the_page_counts_no_span_twice_and_begins_anew_with_another_frontend(backend, tmp_path):
    [script] = re.findall("<script>(.*?)</script>", serve(backend).get(LIVE_PATH).text, re.DOTALL)
    (tmp_path / "page.js").write_text(PLAYED.replace("SCRIPT", script.replace('"use strict";', "")))
    done = subprocess.run(["node", tmp_path / "page.js"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    played = json.loads(done.stdout)
    assert [url.partition("after=")[2] for url in played["asked"]] == ["0", "5", "7", "0"]
    assert played["seen"] == [
        ["1 spans were dropped: there was no room", 5, 5, 1],
        ["4 spans were dropped: there was no room", 7, 7, 4],
        ["a new frontend", 0, 0, 0],
        ["live", 4, 900, 0],
    ]


def test_hits_are_those_of_the_metrics():
    metrics = Metrics(FakeBackend())
    items = [ItemTimings(encode_rank=0), ItemTimings(encode_rank=0, cached=True), ItemTimings()]
    metrics.prompted(40, RequestTimings(items=items, cached_tokens=16))
    metrics.prompted(10, RequestTimings())
    assert metrics.hits == {"tokens": 50, "cached_tokens": 16, "items": 2, "cached_items": 1}
    hidden = Metrics(FakeBackend(), hides_cache_hits=True)
    hidden.prompted(40, RequestTimings(items=items, cached_tokens=16))
    assert hidden.hits == {}


def test_there_is_nothing_of_what_was_asked():
    """Of a span nothing but names that this server made and numbers can be told."""
    made = trace.chrome_trace(Watched(now=NOW, spans=spans()), 60)
    words = {word for e in made["traceEvents"] if e["ph"] == "X" for word in e["args"]}
    assert words <= {"requests", "request_id", "items", "tokens", "images", "rows", "steps"}
    assert json.dumps(made)

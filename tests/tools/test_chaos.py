"""Chaos: the schedule and the verdicts for made-up cases, and a server that plays every fault that has to be seen."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3vl_disagg.core.errors import InputError
from tests.support.server import REPO
from tools import chaos
from tools.chaos_parts.bad_input import JSON, bad_requests
from tools.chaos_parts.client import Patience, exchange
from tools.chaos_parts.growth import Sample, growth, slope
from tools.chaos_parts.load import Load
from tools.chaos_parts.processes import look, send
from tools.chaos_parts.questions import KINDS as REQUESTS
from tools.chaos_parts.questions import Asked, drafts, margin
from tools.chaos_parts.record import Record
from tools.chaos_parts.report import conclude, draw, table
from tools.chaos_parts.schedule import KINDS, Event, events_of, line_of, schedule
from tools.chaos_parts.verdicts import Happening, Outcome, Reply, judge, settle

seeds = st.integers(0, 2**32)


# ---- the schedule ----


@given(seeds, st.sets(st.sampled_from(sorted(KINDS)), min_size=1), st.floats(0, 500))
def test_some_kinds_of_events_after_a_calm(seed, only, calm):
    events = schedule(seed, 1000, 2.0, calm_s=calm, only=only)
    assert all(event.at > calm and event.kind in only for event in events)
    size = sum(KINDS[name].count for name in only)
    assert Counter(event.kind for event in events[:size]) == {name: KINDS[name].count for name in only}


def test_first_tokens_are_told_of_before_the_first_event_and_after_it(record):
    def seen(start: float, first: float | None, verdict: str = "right", near: str = "") -> None:
        record.outcome(Outcome(start, start + 1, "s", "text", verdict, 200, near=near, seconds_to_first=first))

    for number in range(4):
        seen(number, 0.1)
    seen(9.5, 9.0)  # not over when the first event came, and begun before it
    seen(11, 0.5)
    seen(12, 5.0, "wrong")
    seen(13, None)
    seen(14, 7.0, near="afterwards")
    told = conclude(record, 20, 10.0)["seconds_to_first_token"]
    assert told["before"] == {"count": 4, "p50": 0.1, "p99": 0.1, "max": 0.1}
    assert told["after"] == {"count": 1, "p50": 0.5, "p99": 0.5, "max": 0.5}


@given(seeds, st.floats(1, 5_000), st.floats(0, 1), st.floats(0.5, 60))
def test_a_schedule_follows_from_its_seed_and_a_shorter_one_is_its_beginning(seed, seconds, share, every):
    events = schedule(seed, seconds, every)
    assert events == schedule(seed, seconds, every)
    short = schedule(seed, seconds * share, every)
    assert short == [event for event in events if event.at < seconds * share][: len(short)]
    assert [event.at for event in events] == sorted(event.at for event in events)
    assert all(0 <= event.at <= seconds for event in events)


@given(seeds)
def test_each_deck_has_all_kinds_and_every_seed_its_own_order(seed):
    size = sum(kind.count for kind in KINDS.values())
    events = schedule(seed, 10_000, 6.0)
    for start in (0, size):
        dealt = Counter(event.kind for event in events[start : start + size])
        assert dealt == {name: kind.count for name, kind in KINDS.items()}
    stops = [event.args["seconds"] for event in events if event.kind == "stop-encode"]
    assert all(1 <= seconds <= 20 for seconds in stops)
    assert events[:size] != schedule(seed + 1, 10_000, 6.0)[:size]


@given(seeds)
def test_a_log_gives_back_what_was_done(seed):
    planned = schedule(seed, 300, 3.0)
    lines = [json.dumps({"what": "run", "settings": {"seed": seed}})]
    lines += [json.dumps(line_of(event, "plan")) for event in planned]
    assert events_of(lines) == ({"seed": seed}, [])
    done = [replace(event, at=event.at + 0.5) for event in planned]
    lines += [json.dumps(line_of(event, "did", target="encode 1", until=0)) for event in done[:-1]]
    lines += [json.dumps(line_of(event, "skipped", reason="nobody")) for event in done[-1:]]
    lines += [json.dumps({"what": "outcome", "kind": "text"})]
    hit = [replace(event, args={**event.args, "target": "encode 1"}) for event in done[:-1]]
    assert events_of(lines) == ({"seed": seed}, [*hit, *done[-1:]])


@pytest.mark.parametrize(
    "lines", [[], ["{"], ["5"], ['{"what": "run"}'], ['{"what": "did", "at": 1, "kind": "flood", "args": {}}']]
)
def test_what_is_no_log_is_refused(lines):
    with pytest.raises(InputError):
        events_of(lines)


# ---- verdicts ----


def error(status: int, kind: str, code: str = "x", **more) -> Reply:
    said = {"message": "m", "type": kind, "param": None, "code": code}
    return Reply("whole", status, True, said, **more)


JUDGED = [
    ("right", ["a"], Reply("whole", 200, texts=["a"])),
    ("wrong", ["a"], Reply("whole", 200, texts=["b"])),
    ("wrong", ["a", "a"], Reply("whole", 200, texts=["a"])),
    ("wrong", ["a"], Reply("whole", 200, note="not what a body is")),
    ("hung", ["a"], Reply("silent")),
    ("hung", None, Reply("silent", 200)),
    ("left", ["a"], Reply("left", 200)),
    ("cut", ["a"], Reply("cut", 200)),
    ("refused", ["a"], error(429, "rate_limit_error", retry_after="3")),
    ("wrong", ["a"], error(429, "rate_limit_error")),
    ("wrong", ["a"], error(503, "service_unavailable_error", retry_after="soon")),
    ("refused", ["a"], error(504, "timeout_error")),
    ("refused", None, error(503, "service_unavailable_error", retry_after="1")),
    ("broken", ["a"], error(200, "service_unavailable_error")),
    ("failed", ["a"], error(500, "server_error")),
    ("failed", ["a"], error(200, "server_error")),
    ("failed", None, error(500, "server_error")),
    ("wrong", ["a"], error(400, "invalid_request_error")),
    ("refused", ["a"], error(400, "invalid_request_error", "harmful_media")),
    ("right", None, error(400, "invalid_request_error")),
    ("right", None, error(415, "invalid_request_error")),
    ("wrong", None, Reply("whole", 200, texts=["a"])),
    ("wrong", None, error(200, "invalid_request_error")),
    ("wrong", None, Reply("whole", 400, False, {"message": "m"})),
    ("wrong", ["a"], Reply("whole", 502, False)),
]


@pytest.mark.parametrize(("verdict", "expected", "reply"), JUDGED)
def test_a_reply_is_judged(verdict, expected, reply):
    assert judge(expected, reply)[0] == verdict


def outcome(start: float, end: float, verdict="right", status: int | None = 200) -> Outcome:
    return Outcome(start, end, "q", "text", verdict, status)


def test_what_was_cut_needs_a_death_to_explain_it():
    happenings = [Happening("kill-frontend", 10, 10), Happening("burst", 12, 12), Happening("stop-encode", 50, 60)]
    told = [
        (outcome(8, 11, "cut", None), "cut", "kill-frontend"),
        (outcome(9, 30, "cut", 200), "cut", "kill-frontend"),  # the burst was later, and explains nothing
        (outcome(12, 14, "cut", None), "lost", "burst"),
        (outcome(52, 53, "cut", 200), "lost", "stop-encode"),
        (outcome(15, 16, "cut", 200), "lost", "burst"),  # as late as that a death is near, and explains nothing
        (outcome(100, 101, "cut", None), "lost", "none"),
        (outcome(65, 66), "right", "stop-encode"),
        (outcome(72, 73), "right", "none"),
    ]
    settled = settle(happenings, [one for one, _, _ in told])
    assert [(one.verdict, one.near) for one in settled] == [(verdict, near) for _, verdict, near in told]


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), max_size=5), st.floats(0, 100), st.floats(0, 50))
def test_a_cut_is_explained_by_deaths_that_fall_in_its_time_and_by_no_others(deaths, start, length):
    happenings = [Happening("kill-frontend", min(ends), max(ends)) for ends in deaths]
    happenings += [Happening("stop-encode", 0, 200)]
    [settled] = settle(happenings, [outcome(start, start + length, "cut", None)])
    falls = any(one.start <= start + length + 1 and one.until >= start - 1 for one in happenings[:-1])
    assert settled.verdict == ("cut" if falls else "lost")
    assert settled.near == "kill-frontend" or not falls


# ---- slopes ----


@given(st.floats(-1e6, 1e6), st.floats(-1e3, 1e3), st.lists(st.integers(0, 10_000), min_size=2, unique=True))
def test_the_slope_of_a_line_is_its_own(first, per_second, times):
    points = [(float(t), first + per_second * t) for t in times]
    assert slope(points) == pytest.approx(per_second * 3600, rel=1e-4, abs=1.0)


@pytest.mark.parametrize("points", [[], [(1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)]])
def test_no_slope(points):
    with pytest.raises(ValueError, match="slope"):
        slope(points)


def test_growth_is_of_lives_after_the_warm_up():
    def life(name: str, pid: int, first: int, last: int, per_s: int) -> list[Sample]:
        return [Sample(t, name, pid, 1, 50 * 2**20 + per_s * t, 20, 4) for t in range(first, last, 10)]

    samples = [
        *life("frontend", 5, 300, 900, 1024),
        *life("encode 0", 6, 0, 310, 10**6),
        *life("encode 0", 7, 840, 900, 0),
    ]
    steep = [Sample(t, "frontend", 5, 1, 10**6 * t, 900 - t, 4) for t in range(0, 300, 10)]
    young = [Sample(t, "encode 0", 7, 1, 10**6 * t, t, 4) for t in range(710, 770, 10)]
    rows = growth([*samples, *steep, *young], 900)
    assert [(row.name, row.pid) for row in rows] == [("encode 0", 7), ("frontend", 5)]
    assert rows[1].mib_per_hour == pytest.approx(3600 / 1024)
    assert (rows[0].mib_per_hour, rows[1].descriptors_per_hour, rows[1].threads_per_hour) == (0, 0, 0)


# ---- a server that plays faults ----

DONE = b"data: [DONE]\n\n"


def chunk(text: str, reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def response(status: int, body: bytes, kind: str = "application/json", *more: str) -> bytes:
    head = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*head, "", ""]).encode() + body


def stream(*events: bytes) -> bytes:
    """Its end is the end of the connection."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + b"".join(events)


def said(text: str) -> bytes:
    return response(200, json.dumps({"choices": [{"message": {"content": text}}]}).encode())


def typed(status: int, kind: str, *more: str) -> bytes:
    fields = {"message": "m", "type": kind, "param": None, "code": "c"}
    return response(status, json.dumps({"error": fields}).encode(), "application/json", *more)


class Scripted:
    """Answers the n-th connection with the n-th of `replies`, the last one again and again, and closes it; after None
    it holds the connection and says no more."""

    def __init__(self, *replies: bytes | tuple[bytes, None] | None) -> None:
        self._replies = list(replies)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.bodies: list[bytes] = []
        self._held: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        for sock in self._held:
            sock.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            sock.settimeout(5)
            reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
            self._answer(sock, reply)

    def _answer(self, sock: socket.socket, reply: bytes | tuple[bytes, None] | None) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += sock.recv(65536)
        head, _, body = received.partition(b"\r\n\r\n")
        size = int(re.search(rb"content-length: (\d+)", head.lower())[1])
        while len(body) < size:
            body += sock.recv(65536)
        self.bodies.append(body)
        now, holds = reply if isinstance(reply, tuple) else (reply, b"")
        sock.sendall(now or b"")
        if now is None or holds is None:
            self._held.append(sock)
        else:
            sock.close()


FAILED = (
    b"data: "
    + json.dumps({"error": {"message": "m", "type": "service_unavailable_error", "param": None, "code": "c"}}).encode()
    + b"\n\n"
)

PLAYED: list[tuple[str, object]] = [
    ("right", said("red")),
    ("wrong", said("blue")),
    ("wrong", response(200, b"{")),
    ("right", stream(chunk("re"), chunk("d"), chunk("", "stop"), DONE)),
    ("wrong", stream(chunk("re"), chunk("", "stop"), DONE)),
    ("wrong", stream(chunk("red"), DONE)),
    ("broken", stream(chunk("re"), FAILED)),
    ("cut", stream(chunk("red"), chunk("", "stop"))),
    ("cut", b""),
    ("cut", b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{"),
    ("cut", b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata"),
    ("hung", None),
    ("hung", (stream(chunk("re")), None)),
    ("refused", typed(429, "rate_limit_error", "Retry-After: 2")),
    ("wrong", typed(429, "rate_limit_error")),
    ("failed", typed(500, "server_error")),
    ("wrong", response(502, b"<html>", "text/html")),
]


@pytest.mark.parametrize(("verdict", "reply"), PLAYED)
def test_what_a_server_does_is_seen(verdict, reply):
    with Scripted(reply) as server:
        assert judge(["red"], exchange(server.port, b"{}", JSON, Patience(0.3)))[0] == verdict


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    assert judge(["red"], exchange(port, b"{}", JSON, Patience(0.3)))[0] == "cut"


def test_a_client_leaves_and_a_slow_one_is_answered():
    with Scripted(None) as server:
        assert exchange(server.port, b"{}", JSON, Patience(9, leave_after_s=0.1)).ending == "left"
    with Scripted((stream(chunk("re")), None)) as server:
        reply = exchange(server.port, b"{}", JSON, Patience(9, leave_after_s=0.1))
        assert (reply.ending, reply.status) == ("left", 200)
    with Scripted(stream(chunk("red"), chunk("", "stop"), DONE)) as server:
        body = json.dumps({"a": "b" * 100}).encode()
        started = time.monotonic()
        assert judge(["red"], exchange(server.port, body, JSON, Patience(9, pause_s=0.02)))[0] == "right"
        assert time.monotonic() - started > 8 * 0.02
        assert server.bodies == [body]


@pytest.fixture
def record(tmp_path) -> Iterator[Record]:
    with Record(tmp_path / "log.jsonl") as record:
        yield record


ASK = Asked("0 text", "text", {"messages": []}, ["red"])


def ask(record: Record, server: Scripted, **fields) -> dict:
    client = Load(server.port, [ASK], bad_requests(), record, 0.2)
    client.ask_again(ASK, **fields)
    return conclude(record, 10.0)


@pytest.mark.parametrize(
    ("planted", "reply"),
    [("wrong", said("blue")), ("hung", None), ("lost", b""), ("failed", typed(500, "server_error"))],
)
def test_a_planted_fault_is_counted_and_told(record, monkeypatch, planted, reply):
    monkeypatch.setattr("tools.chaos_parts.load.GRACE_S", 0.1)
    with Scripted(said("red")) as good:
        assert ask(record, good)["ok"]
    with Scripted(reply) as server:
        result = ask(record, server)
    assert (result["asked"], result["right"], result[planted], result["ok"]) == (2, 1, 1, False)
    assert planted in result["bad"][0]
    assert re.search(rf"^bad: .*{planted}", table(result), re.MULTILINE)


def test_a_death_of_the_frontend_explains_a_cut_and_a_stop_does_not(record):
    with Scripted(b"") as server:
        record.did(Event(0, "kill-frontend", {}), record.now(), record.now())
        result = ask(record, server)
    assert (result["cut"], result["lost"], result["ok"]) == (1, 0, True)
    with Scripted(stream(chunk("re"))) as server:
        record.happenings[:] = [Happening("stop-encode", record.now(), record.now())]
        record.outcomes.clear()
        result = ask(record, server)
    assert (result["cut"], result["lost"], result["ok"]) == (0, 1, False)


def test_retry_after_is_obeyed_and_each_try_is_in_the_record(record):
    with Scripted(typed(429, "rate_limit_error", "Retry-After: 1"), said("red")) as server:
        started = time.monotonic()
        result = ask(record, server, is_fresh=True)
        assert time.monotonic() - started >= 1.0
        salts = [json.loads(body)["cache_salt"] for body in server.bodies]
    assert (result["asked"], result["refused"], result["right"], result["right_after_refusals"]) == (2, 1, 1, 1)
    assert len(set(salts)) == 2
    lines = [json.loads(line) for line in Path(record._file.name).read_text().splitlines()]
    assert [line["verdict"] for line in lines if line["what"] == "outcome"] == ["refused", "right"]


def test_trouble_is_no_success(record):
    with Scripted(said("red")) as server:
        record.trouble("the job ended by itself")
        assert not ask(record, server)["ok"]


def test_bursts_bad_input_and_those_who_hang_up_are_all_counted(record):
    with Scripted(typed(400, "invalid_request_error")) as server:
        client = Load(server.port, [ASK], bad_requests(), record, 5.0)
        client.bad_input(count=5, first=998)
        assert client.join(20) == 0
    assert [one.verdict for one in record.outcomes] == ["right"] * 5
    with Scripted(said("red")) as server:
        client = Load(server.port, [ASK], bad_requests(), record, 5.0)
        client.burst(count=7, seed=1)
        assert client.join(20) == 0
    with Scripted((stream(chunk("re")), None)) as server:
        client = Load(server.port, [ASK], bad_requests(), record, 5.0)
        client.hang_up(after_s=[0.05, 0.1, 0.2], seed=1)
        assert client.join(20) == 0
    result = conclude(record, 10.0)
    assert (result["asked"], result["right"], result["left"]) == (15, 12, 3)
    assert result["kinds"]["bad input"] == {"asked": 5, "right": 5}


def test_the_picture(record, tmp_path):
    record.sample([Sample(t, name, 5, 1, 2**20, 9, 3) for t in range(3) for name in ("frontend", "encode 0")])
    draw(record.samples, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ---- requests, processes, arguments ----


def test_requests_of_all_kinds_follow_from_the_seed():
    made = list(drafts(3, 22))
    assert Counter(draft.kind for draft in made) == dict.fromkeys(REQUESTS, 2)
    assert made == list(drafts(3, 22))
    pictures = {draft.kind: [part for part in draft.messages[0]["content"] if "image_url" in part] for draft in made}
    assert [len(pictures[kind]) for kind in ("text", "image", "two images", "one image twice")] == [0, 1, 2, 2]
    assert margin([[(1, -0.1), (2, -0.5)], [(4, -0.3), (3, -0.2)]], [1, 3]) == pytest.approx(0.1)
    assert len({bad.name for bad in bad_requests()}) == len(bad_requests()) > 30


def test_a_signal_does_not_hit_another_process_with_the_same_number():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        found = look(process.pid)
        assert not send(replace(found, started=found.started + 1), 9)
        assert process.poll() is None
        assert send(found, 9)
        assert process.wait(10) == -9
        assert not send(found, 9)
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hours", "0"],
        ["--hours", "nan"],
        [],
        ["--hours", "1", "--world", "2", "--encode-ranks", "2"],
        ["--hours", "1", "--clients", "0"],
        ["--hours", "1", "--every", "0"],
        ["--hours", "1", "--log", "/nowhere/at/all"],
        ["--replay", "/nowhere/at/all"],
        ["--hours", "1", "--flood"],
        ["--hours", "0.1", "--calm", "360"],
        ["--hours", "1", "--only", "kill-everything"],
        ["--hours", "1", "--only", "kill-language"],
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments):
    monkeypatch.setattr(chaos, "run", lambda *_: pytest.fail("it was started"))
    monkeypatch.setattr(chaos.signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["chaos.py", *arguments])
    try:
        status = chaos.main()
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert capsys.readouterr().err


@pytest.mark.acceptance
@pytest.mark.timeout(600)
def test_a_minute_of_chaos_and_the_same_again(tmp_path):
    log, again = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    command = [sys.executable, "tools/chaos.py", "--json", "--pool", str(tmp_path / "pool.json")]
    first = [*command, "--hours", "0.017", "--seed", "3", "--every", "2.5", "--questions", "22", "--log", str(log)]
    for arguments, file in ((first, log), ([*command, "--replay", str(log), "--log", str(again)], again)):
        done = subprocess.run(arguments, cwd=REPO, capture_output=True, text=True, timeout=280)
        result = json.loads(done.stdout)
        assert (done.returncode, result["ok"]) == (0, True), result
        assert result["right"] > 50
        assert result["events"]["kill-encode"] > 0
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert sum(line["what"] == "outcome" for line in lines) == result["asked"]
        assert result["near"]["afterwards"] == {"asked": 22 + len(bad_requests()), "right": 22 + len(bad_requests())}
    kinds = [[event.kind for event in events_of(path.read_text().splitlines())[1]] for path in (log, again)]
    assert kinds[0] == kinds[1]

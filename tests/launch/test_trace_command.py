"""`qwen3vl-disagg trace`: a file that opens, or one line that says why there is none."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_disagg import cli
from qwen3vl_disagg.cluster.traces import Clock, Watched
from qwen3vl_disagg.core.spans import Span
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.limits import Limits
from tests.support.fake_backend import FakeBackend, tiny_processor
from tests.support.running import RunningApp

RANK = ("encode", 0)


class Foreign:
    """An app that is no server of ours: it answers what it is told to, and keeps what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[dict[str, str]] = []
        self.answers()

    def answers(self, body: bytes = b"[]", status: int = 200, **headers: str) -> None:
        self.status, self.body = status, body
        given = {"content-length": str(len(body)), **headers}
        self.headers = [(name.encode(), value.encode()) for name, value in given.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.asked.append({name.decode(): value.decode() for name, value in scope["headers"]})
            await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
            await send({"type": "http.response.body", "body": self.body})


@pytest.fixture(scope="module")
def foreign_server() -> Iterator[Foreign]:
    app = Foreign()
    with RunningApp(app) as running:
        app.url = running.url
        yield app


@pytest.fixture
def foreign(foreign_server) -> Foreign:
    foreign_server.asked.clear()
    foreign_server.answers()
    return foreign_server


@pytest.fixture(scope="module")
def closed_url() -> Iterator[str]:
    """Nobody listens there, and nobody else can have the port meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningApp]:
    backend = FakeBackend()
    seen = [(RANK, Span("encode", "tower_0", 98.0, 99.0, ["a"])), (RANK, Span("encode", "tower_0", 50.0, 51.0, ["b"]))]
    backend.watched = Watched(now=100.0, spans=seen, clocks={RANK: Clock()}, silent=[RANK])
    with RunningApp(create_app(backend, tiny_processor(), model_name="tiny", keys=ApiKeys(["secret"]))) as running:
        yield running


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Exit status, stdout and stderr, without what the server, in the same process, has logged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("Q3VL_API_KEY", raising=False)

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qwen3vl-disagg", "trace", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        said = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("request request_id="))
        return int(ended.value.code or 0), out, said

    return call


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_it_writes_the_trace_and_says_how_to_open_it(server, run, path):
    status, out, err = run("--url", server.url + path, "--api-key", "secret", "--seconds", "10")
    assert (status, err) == (0, "")
    made = json.loads(Path("trace.json").read_text())
    assert [e["args"]["request_id"] for e in made["traceEvents"] if e["ph"] == "X"] == ["a"]
    first, note, last = out.splitlines()
    assert first == "trace.json: 1 spans of encode rank 0, the last 10 s"
    assert note == "not heard: encode rank 0"
    assert "ui.perfetto.dev" in last
    assert "chrome://tracing" in last


def test_the_key_may_stand_in_the_environment_and_the_file_elsewhere(server, run, monkeypatch):
    monkeypatch.setenv("Q3VL_API_KEY", "secret another")
    assert run("--url", server.url, "--out", "other.json", "--seconds", "600")[0] == 0
    assert len([e for e in json.loads(Path("other.json").read_text())["traceEvents"] if e["ph"] == "X"]) == 2


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["--url", "nowhere"], 2, "--url nowhere: must be the server's"),
        (["--url", "ftp://127.0.0.1"], 2, "must be the server's"),
        (["--url", "http://"], 2, "must be the server's"),
        (["--url", "http://127.0.0.1:99999"], 2, "must be the server's"),
        (["--url", "http://127.0.0.1/\u00e9"], 2, "must be the server's"),
        (["--seconds", "0"], 2, "--seconds 0: must be more than 0"),
        (["--seconds", "nan"], 2, "--seconds nan"),
        (["--seconds", "601"], 2, "--seconds 601"),
        (["--api-key", "é"], 2, "visible ASCII"),
        (["--api-key", "a\nb: c"], 2, "visible ASCII"),
    ],
)
def test_what_is_wrong_is_one_line(run, args, status, says):
    ended, out, err = run(*args)
    assert (ended, out) == (status, "")
    [line] = err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not Path("trace.json").exists()


def test_where_nobody_answers_it_is_one_line(run, closed_url, monkeypatch):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    ended, out, err = run("--url", closed_url)
    assert (ended, out) == (1, "")
    assert err == f"error: no answer from {closed_url}: Connection refused\n"
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    ended, out, err = run("--url", "http://name.invalid")
    assert (ended, out) == (1, "")
    assert err == "error: no answer from http://name.invalid: Name or service not known\n"


@pytest.mark.parametrize("key", [[], ["--api-key", "wrong"]])
def test_a_wrong_key_is_the_callers(server, run, key):
    ended, out, err = run("--url", server.url, *key)
    assert (ended, out) == (2, "")
    assert "needs a valid --api-key, or Q3VL_API_KEY" in err
    assert not Path("trace.json").exists()


def test_what_the_server_says_is_handed_on_and_another_server_is_none(run):
    limits = Limits(hide_cache_hits=True)
    with RunningApp(create_app(FakeBackend(), tiny_processor(), model_name="tiny", limits=limits)) as running:
        ended, _, err = run("--url", running.url)
        assert ended == 1
        assert "answered 403: with --hide-cache-hits" in err
        ended, _, err = run("--url", f"{running.url}/elsewhere")
        assert ended == 1
        assert "answered 404" in err


def trace_of(*events: Any, **more: Any) -> bytes:
    return json.dumps({"traceEvents": list(events), **more}).encode()


NAMED = {"name": "process_name", "ph": "M", "args": {"name": "encode rank 0"}}


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"\xff",
        b"{}",
        b'{"traceEvents": {}}',
        b'{"traceEvents": 1}',
        trace_of(1),
        trace_of({"name": "encode"}),
        trace_of({"name": "process_name", "ph": "M"}),
        trace_of(otherData=[1]),
        trace_of(otherData=None),
        b"[" * 100_000,
        b'{"traceEvents": ' + b"[" * 100_000,
    ],
)
def test_what_is_no_trace_is_not_written(foreign, run, body):
    foreign.answers(body)
    ended, out, err = run("--url", foreign.url)
    assert (ended, out) == (1, "")
    assert err == f"error: what {foreign.url} answered is no trace\n"
    assert not Path("trace.json").exists()


def test_what_another_says_moves_no_cursor(foreign, run):
    evil = "\x1b]0;title\x07\r\nerror: \u202e" + "x" * 2000
    rank = {**NAMED, "args": {"name": evil}}
    foreign.answers(trace_of(rank, otherData={evil: evil, "plain": "note", "number": 3}))
    ended, out, _ = run("--url", foreign.url)
    assert ended == 0
    assert out.replace("\n", "").isprintable()
    assert [line.partition(":")[0] for line in out.splitlines()][::2] == ["trace.json", "plain"]
    assert all(len(line) < 400 for line in out.splitlines())
    foreign.answers(json.dumps({"error": {"message": evil}}).encode(), status=500)
    ended, _, err = run("--url", foreign.url, "--overwrite")
    assert ended == 1
    assert err.startswith(f"error: {foreign.url} answered 500: ")
    assert err.count("\n") == 1
    assert err.rstrip("\n").isprintable()


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_the_key_goes_past_proxies(foreign, closed_url, run, monkeypatch, name):
    for variable in ("no_proxy", "NO_PROXY", "REQUEST_METHOD"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, foreign.url)
    assert run("--url", closed_url, "--api-key", "secret")[0] == 1
    assert foreign.asked == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("to", ["/elsewhere", "http://["])
def test_the_key_follows_no_redirect(foreign, run, status, to):
    foreign.answers(b"", status, location=to)
    ended, _, err = run("--url", foreign.url, "--api-key", "secret")
    assert ended == 1
    assert f"{foreign.url} answered {status}: " in err
    assert [each["x-api-key"] for each in foreign.asked] == ["secret"]


def test_a_file_that_is_there_is_replaced_only_if_that_is_wanted(foreign, run):
    foreign.answers(trace_of(NAMED))
    Path("trace.json").write_text("mine")
    ended, _, err = run("--url", foreign.url)
    assert (ended, foreign.asked) == (2, [])
    assert "--out trace.json: the file is there; --overwrite would replace it" in err
    assert Path("trace.json").read_text() == "mine"
    assert run("--url", foreign.url, "--overwrite")[0] == 0
    assert Path("trace.json").read_bytes() == foreign.body
    assert run("--url", foreign.url, "--out", "/dev/null")[0] == 0


def test_a_file_that_cannot_be_written_is_named(server, run):
    ended, _, err = run("--url", server.url, "--api-key", "secret", "--out", "no/such/folder.json")
    assert ended == 2
    assert "--out no/such/folder.json: No such file or directory" in err

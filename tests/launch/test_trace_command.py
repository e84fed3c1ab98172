"""`qwen3vl-disagg trace`: a file that opens, or one line that says why there is none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3vl_disagg import cli
from qwen3vl_disagg.cluster.traces import Clock, Watched
from qwen3vl_disagg.core.spans import Span
from qwen3vl_disagg.serving.access import ApiKeys
from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.limits import Limits
from tests.support.fake_backend import FakeBackend, tiny_processor
from tests.support.running import RunningApp
from tests.support.server import free_port

RANK = ("encode", 0)


@pytest.fixture
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
        (["--url", f"http://127.0.0.1:{free_port()}"], 1, "no answer from http://127.0.0.1"),
        (["--url", "http://name.invalid"], 1, "no answer from http://name.invalid"),
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

    async def health(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"[]"})

    with RunningApp(health) as running:
        ended, _, err = run("--url", running.url)
        assert ended == 1
        assert "is no trace" in err


def test_a_file_that_cannot_be_written_is_named(server, run):
    ended, _, err = run("--url", server.url, "--api-key", "secret", "--out", "no/such/folder.json")
    assert ended == 2
    assert "--out no/such/folder.json: No such file or directory" in err

"""`qwen3vl-disagg serve`: a wrong option is one line, a signal the clean end, without torchrun on the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest

from qwen3vl_disagg import cli
from tests.support.running import wait_for
from tests.support.server import descendants, free_port

KEY = "pa$$word$local_rank"
"""torch fills such things in, where it is let."""
COMMAND = [sys.executable, "-m", "qwen3vl_disagg", "serve"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--world", "0"], "--world 0: must be 1 to"),
        (["--world", "800000"], "--world 800000: must be 1 to"),
        (["--world", "2", "--encode-ranks", "2"], "encode"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--chunk-tokens", "0"], "--chunk-tokens 0: must be at least 1"),
        (["--preset", "2b"], "--preset goes with --dry-run only"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_starts(monkeypatch, capsys, options, says):
    monkeypatch.setattr("qwen3vl_disagg.launch.command._supervise", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.setattr("qwen3vl_disagg.launch.command.run_slot", lambda *_: pytest.fail("a rank was started"))
    monkeypatch.setattr(sys, "argv", ["qwen3vl-disagg", "serve", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_a_dry_run_needs_no_ranks():
    done = subprocess.run([*COMMAND, "--world", "3", "--dry-run", "--json"], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["world"] == 3


@pytest.mark.parametrize("world", [1, 2])
def test_it_serves_and_ends_clean(world):
    port = free_port()
    with tempfile.NamedTemporaryFile("w+") as log:
        command = [*COMMAND, "--world", str(world), "--port", str(port), "--api-key", KEY]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)

        def said() -> str:
            return Path(log.name).read_text()

        try:
            wait_for(lambda: f"ready: http://127.0.0.1:{port}" in said() or process.poll() is not None, 90)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=20) as reply:
                assert json.load(reply)["status"] == "ready"
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", headers={"x-api-key": KEY})
            assert urllib.request.urlopen(request, timeout=20).status == 200
            children = descendants(process.pid)
            assert len(children) >= world
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0, said()
            wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 10)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
        assert not any(word in said() for word in ("Traceback", "death signal", "torch.distributed"))
        assert len(said().splitlines()) < 12


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([*COMMAND, "--port", str(port)], capture_output=True, text=True, timeout=90)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: cannot listen on 127.0.0.1:{port}")

"""`qwen3vl-disagg serve`: a wrong option is one line, a signal the clean end, without torchrun on the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest

from tests.support.command import run_command
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
    status, out, err = run_command(monkeypatch, capsys, "serve", *options)
    assert (status, out) == (2, "")
    [line] = err.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_a_dry_run_needs_no_ranks():
    done = subprocess.run([*COMMAND, "--world", "3", "--dry-run", "--json"], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["world"] == 3


def test_who_looks_on_is_told_what_is_going_on_before_torch_is_there(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, _, err = run_command(monkeypatch, capsys, "serve", "--world", "0")
    first, error = err.splitlines()
    assert re.fullmatch(r"at \d+\.\d s: loading PyTorch, checking the arguments and the checkpoint", first)
    assert error.startswith("error: world: --world 0")


STAGE = re.compile(r"(?:([a-z ]+\d*): )?(?:at (\d+\.\d) s: (.*)|ready in (\d+\.\d) s)")


def check_start(world: int, lines: list[str]) -> None:
    """One line for each stage, none of them by two ranks, and the last one by the frontend."""
    found = [match for line in lines if (match := STAGE.fullmatch(line))]
    *said, last = [re.sub(r", [\d.]+ MiB$", "", match[3] or "ready") for match in found]
    expected = {"reading the weights of the decoder", "reading the weights of the vision tower"}
    expected |= {"a picture through the vision tower", "prompts with visual rows through the decoder"}
    expected |= {"waiting for encode ranks and their links"}
    if world == 1:
        expected |= {"starting ranks: both roles in one process"}
    else:
        expected |= {"loading PyTorch in 2 processes", "starting ranks: 1 encode, 1 language"}
    assert {what for what in said if "waiting: " not in what} == expected
    assert len(said) == len(set(said))
    assert (last, found[-1][1]) == ("ready", "frontend")
    seconds = [float(match[2] or match[4]) for match in found]
    assert 0 < seconds[0] <= seconds[-1] == max(seconds) < 90


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
            check_start(world, said().splitlines())
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0, said()
            wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 10)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
        assert not any(word in said() for word in ("Traceback", "death signal", "torch.distributed"))
        assert len(said().splitlines()) < 14


def test_a_port_that_is_taken_is_one_line_after_those_of_the_start():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([*COMMAND, "--port", str(port)], capture_output=True, text=True, timeout=90)
    assert done.returncode == 2
    *stages, line = done.stderr.splitlines()
    assert all(STAGE.fullmatch(stage) for stage in stages)
    assert line.startswith(f"error: cannot listen on 127.0.0.1:{port}")

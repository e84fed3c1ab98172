"""How far a start is: who says it, since when it counts, and when it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from qwen3vl_disagg.core.host import process_started
from qwen3vl_disagg.core.progress import Progress

SCRIPT = """
import os, time
from qwen3vl_disagg.core.logs import start_logging, use_log_format
from qwen3vl_disagg.core.progress import Progress
use_log_format("FORMAT")
start_logging("rank 0")
progress = Progress(time.monotonic() - 61.24)
progress.stage("ranks", "starting ranks", encode=2)
Progress(is_heard=False).stage("ranks", "never")
progress.weights("decoder", 3 << 29)
progress.weights("tower", 3 << 20)
if os.fork() == 0:
    start_logging("frontend")
    progress.end()
    os._exit(0)
os.wait()
progress.stage("weights", "again, when the rank is forked a second time")
progress.end()
"""


def lines(log_format: str) -> list[str]:
    script = SCRIPT.replace("FORMAT", log_format)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    return done.stderr.splitlines()


def test_a_line_for_each_stage_and_none_after_the_last():
    assert lines("text") == [
        "rank 0: at 61.2 s: starting ranks",
        "rank 0: at 61.2 s: reading the weights of the decoder, 1.5 GiB",
        "rank 0: at 61.2 s: reading the weights of the tower, 3.0 MiB",
        "frontend: ready in 61.2 s",
    ]


def test_as_json_they_have_fields():
    first, weights, _, last = map(json.loads, lines("json"))
    assert (first["message"], first["stage"], first["encode"]) == ("at 61.2 s: starting ranks", "ranks", 2)
    assert first["seconds"] == pytest.approx(61.24, abs=0.5)
    assert (weights["stage"], weights["bytes"]) == ("weights", 3 << 29)
    assert (last["process"], last["stage"], last["message"]) == ("frontend", "ready", "ready in 61.2 s")


def test_it_counts_from_when_the_command_was_given():
    before = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        time.sleep(0.5)
        started = process_started(process.pid)
    assert before - 0.05 <= started <= before + 0.3
    assert process_started(os.getpid()) < before


def test_of_a_process_that_is_not_there_nothing_is_known():
    before = time.monotonic()
    assert before <= process_started(2**22 + 1) <= time.monotonic()


def test_who_does_not_speak_can_end_it_all_the_same(caplog):
    progress = Progress(is_heard=False)
    progress.end()
    assert progress.is_over
    assert caplog.text == ""

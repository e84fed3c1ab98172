"""How far a start is: who says it, since when it counts, and when it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

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
    said = lines("text")
    assert [re.sub(r"\d+\.\d s", "SOME s", line) for line in said] == [
        "rank 0: at SOME s: starting ranks",
        "rank 0: at SOME s: reading the weights of the decoder, 1.5 GiB",
        "rank 0: at SOME s: reading the weights of the tower, 3.0 MiB",
        "frontend: ready in SOME s",
    ]
    seconds = [float(re.findall(r"(\d+\.\d) s", line)[0]) for line in said]
    assert 61.2 <= seconds[0] <= seconds[-1] < 75


def test_as_json_they_have_fields():
    first, weights, _, last = map(json.loads, lines("json"))
    assert (first["stage"], first["encode"]) == ("ranks", 2)
    assert first["message"] == f"at {first['seconds']:.1f} s: starting ranks"
    assert 61.24 <= first["seconds"] < 75
    assert (weights["stage"], weights["bytes"]) == ("weights", 3 << 29)
    assert (last["process"], last["stage"]) == ("frontend", "ready")
    assert last["message"].startswith("ready in 6")


def test_it_counts_from_when_the_command_was_given():
    before = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        after = time.monotonic()
        time.sleep(0.5)
        started = process_started(process.pid)
    assert before - 0.05 <= started <= after + 0.05
    assert process_started(os.getpid()) < before


def test_of_a_process_that_is_not_there_nothing_is_known():
    before = time.monotonic()
    assert before <= process_started(2**22 + 1) <= time.monotonic()


def test_who_does_not_speak_can_end_it_all_the_same(caplog):
    progress = Progress(is_heard=False)
    progress.end()
    assert progress.is_over
    assert caplog.text == ""

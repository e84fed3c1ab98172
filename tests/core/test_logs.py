"""One way of logging, with the name of who speaks."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import qwen3vl_disagg

SCRIPT = """
import logging, os
from qwen3vl_disagg.core.logs import start_logging
log = logging.getLogger("qwen3vl_disagg.engine")
start_logging()
log.info("before")
start_logging("encode rank 3")
log.info("joined as %d", 3)
log.debug("never")
logging.getLogger("another").info("never")
logging.getLogger("another").warning("told")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
if os.fork() == 0:
    start_logging("frontend")
    log.warning("100% forked")
    os._exit(0)
os.wait()
"""


def test_lines_name_who_speaks():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    first, *lines, last = done.stderr.splitlines()
    assert (first, last) == ("before", "frontend: 100% forked")
    assert lines[:4] == [
        "encode rank 3: joined as 3",
        "encode rank 3: told",
        "encode rank 3: failed",
        "Traceback (most recent call last):",
    ]
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_without_a_start_warnings_are_shown_and_nothing_is_set_up():
    """As in a program that imports the package."""
    script = SCRIPT.replace("start_logging()\n", "").replace('start_logging("encode rank 3")\n', "")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[:2] == ["told", "failed"]


def test_there_is_no_other_way():
    """What may write to stderr beside the log: progress bars, the commands' own lines, and the log itself."""
    package = Path(qwen3vl_disagg.__file__).parent
    allowed = {"core/logs.py", "core/errors.py", "generate.py", "cluster/slots.py"}
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if "print_exc" in line or ("sys.stderr" in line and ("print(" in line or "write_line(" in line))
    }
    assert found == allowed


@pytest.mark.parametrize("flag", [[], ["-u"]])
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_line_is_one_write(flag, log_format):
    """Several processes have the same stderr: what is written in two parts may have a part of another line between."""
    script = f"""
import logging, sys
from qwen3vl_disagg.core.logs import start_logging, use_log_format, write_line
use_log_format({log_format!r})
start_logging("rank")
log = logging.getLogger("qwen3vl_disagg")
log.info("short")
log.info("long " + "x" * 20_000)
log.info("two\\nlines")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
write_line(sys.stderr, "ready")
"""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with its:
            subprocess.run([sys.executable, *flag, "-c", script], stderr=its, timeout=60, check=True)
        writes = list(iter(lambda: ours.recv(100_000).decode(), ""))
    assert len(writes) == 5
    for text, word in zip(writes, ("short", "long xx", "two", "ZeroDivisionError", "ready"), strict=True):
        assert word in text
        assert text.endswith("\n")


def test_lines_of_json():
    script = SCRIPT.replace("start_logging\n", "start_logging, say, use_log_format\nuse_log_format('json')\n", 1)
    script += "say('request', {'status': 200, 'path': '\\ud800'})\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert {(line["process"], line["message"]) for line in lines} == {
        ("", "before"),
        ("encode rank 3", "joined as 3"),
        ("encode rank 3", "told"),
        ("encode rank 3", "failed"),
        ("frontend", "100% forked"),
        ("encode rank 3", "request"),
    }
    assert [line["level"] for line in lines[:4]] == ["info", "info", "warning", "error"]
    assert lines[3]["traceback"].endswith("ZeroDivisionError: division by zero")
    assert (lines[-1]["status"], lines[-1]["path"]) == (200, "\ud800")
    assert all(line["time"].endswith("+00:00") for line in lines)

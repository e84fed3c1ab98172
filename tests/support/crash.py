"""One fault in a served system of real processes: what became of the requests, and what was left."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tests.support.server import REPO, Server

DEADLINE_S = 90.0
HIDDEN = 2048
"""Rows of 8 KiB: 576 of them are a payload of 4.7 MB and 14 MB of DeepStack, in runs of RUN_BYTES."""


def make_model(folder: Path) -> Path:
    """A random checkpoint with long rows and little else."""
    command = [sys.executable, "tools/make_checkpoint.py", "--out", str(folder), "--preset", "tiny-random"]
    sizes = {
        "text.hidden-size": HIDDEN,
        "vision.out-hidden-size": HIDDEN,
        "text.num-hidden-layers": 4,
        "text.max-position-embeddings": 8192,
        "max-pixels": 1 << 20,
    }
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    subprocess.run([*command, *options], cwd=REPO, check=True, timeout=120)
    return folder


def picture(seed: int, side: int = 768) -> bytes:
    """A JPEG that differs with the seed; 768 x 768 pixels are 576 rows."""
    image = Image.new("RGB", (side, side), (seed * 53 % 256, seed * 101 % 256, 90))
    for k in range(8):
        left = (seed * 37 + k * 61) % (side - 100)
        image.paste((k * 30, 255 - k * 30, seed * 17 % 256), (left, k * 80, left + 90, k * 80 + 70))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()


def content(*pictures: bytes) -> list[dict[str, Any]]:
    urls = ["data:image/jpeg;base64," + base64.b64encode(data).decode() for data in pictures]
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": "a"}]


@dataclass
class Result:
    fired: bool = False
    outcomes: list[str] = field(default_factory=list)
    """Of each request: "right", "WRONG", "typed CODE", or "CLOSED"."""
    slowest_s: float = 0.0
    after: str = ""
    """The same for one request asked when all is over."""
    left_over: list[str] = field(default_factory=list)
    survivors: int = 0
    job_ended: bool = False
    log: str = ""

    @property
    def is_good(self) -> bool:
        """Right or typed within the deadline, right afterwards unless the job is over, nothing left."""
        ends = all(outcome == "right" or outcome.startswith("typed") for outcome in self.outcomes)
        is_over = self.job_ended or self.after == "right"
        return self.fired and ends and is_over and not self.left_over and not self.survivors


def ask(server: Server, parts: list[dict[str, Any]], expected: list[int]) -> str:
    try:
        status, answer = server.chat(parts, timeout=DEADLINE_S, max_tokens=4)
    except (urllib.error.URLError, OSError, ValueError):
        return "CLOSED"
    if status != 200:
        return f"typed {answer['error']['code']}"
    return "right" if answer["choices"][0]["token_ids"] == expected else "WRONG"


def abandon(server: Server, parts: list[dict[str, Any]], after_s: float) -> None:
    """Ask, and hang up."""
    body = json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": 4}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    try:
        with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
            sock.sendall(head.encode() + b"\r\n\r\n" + body)
            time.sleep(after_s)
    except OSError:
        return  # the server is on its way down


def hang_up(server: Server, mark: Path) -> None:
    """Hang up on requests at several points of their way, until the fault has struck somewhere."""
    for after_s in (0.7, 0.3, 1.0, 0.5, 1.4, 0.2, 2.0):
        abandon(server, content(picture(9), picture(8)), after_s)
        if mark.exists():
            return


def has_ended(server: Server, patience_s: float) -> bool:
    """Whether torchrun leaves by itself."""
    end = time.monotonic() + patience_s
    while server.process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    return server.process.poll() is not None


def run_fault(model: Path, point: str, action: str, expected: dict[int, list[int]], world: int = 2) -> Result:
    """Start a server with this fault in it, ask several things at once, hang up on one, ask again, end the server."""
    result = Result()
    mark = Path(tempfile.mkdtemp(prefix="fault-")) / "mark"
    os.environ["Q3VL_FAULT"], os.environ["Q3VL_FAULT_MARK"] = f"{point}:1:{action}", str(mark)
    sizes = ("--block-size", "128", "--blocks", "3", "--deepstack-rows", "1280")
    server = Server(world, "--model", str(model), *sizes)
    try:
        with server:
            with ThreadPoolExecutor(5) as pool:
                hung_up = pool.submit(hang_up, server, mark)
                started = time.monotonic()
                answers = [pool.submit(ask, server, content(picture(n)), expected[n]) for n in expected]
                result.outcomes = [answer.result(DEADLINE_S + 30) for answer in answers]
                result.slowest_s = time.monotonic() - started
                hung_up.result(30)
            time.sleep(0.5)
            result.job_ended = server.process.poll() is not None or "exitcode" in server.output()
            if not result.job_ended:
                result.after = ask(server, content(picture(1)), expected[1])
                result.job_ended = result.after != "right" and has_ended(server, 40.0)
    except AssertionError as error:  # it never became ready
        result.job_ended, result.log = True, str(error)[-1500:]
    finally:
        for name in ("Q3VL_FAULT", "Q3VL_FAULT_MARK"):
            os.environ.pop(name, None)
    result.fired = mark.exists()
    output = server.output()
    result.left_over = [line for line in output.splitlines() if "left over" in line]
    result.survivors = len(server.alive())
    result.log = result.log or output[-3000:]
    return result

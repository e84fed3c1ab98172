"""A served system for a benchmark: `recipes/serve.py` under torchrun, on cores that it is given."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from qwen3vl_disagg.launch.trace import direct

REPO = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """One that the kernel gives to no connection by itself: until the server binds it, it stays free."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class Served:
    """`with Served(..) as server`: ready within, ended after.

    `cores`: the only ones it may use; a rank's threads are its share of them.
    """

    def __init__(
        self, world: int, options: Sequence[str], cores: Sequence[int] | None = None, *, ready_s: float = 240.0
    ) -> None:
        self.ready_s = ready_s
        self.port = free_port()
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - till the end
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
        launch += [f"--master-port={free_port()}", "recipes/serve.py", "--port", str(self.port), *options]
        allowed = os.sched_getaffinity(0)
        if cores is not None:
            os.sched_setaffinity(0, cores)  # the child inherits it
        try:
            self.process = subprocess.Popen(
                launch,
                cwd=REPO,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        finally:
            os.sched_setaffinity(0, allowed)

    def wait_ready(self) -> None:
        """RuntimeError with the end of its log when it does not come up."""
        end = time.monotonic() + self.ready_s
        while not re.search("^ready: ", Path(self.log.name).read_text(), re.MULTILINE):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"serve.py did not come up:\n{Path(self.log.name).read_text()[-2000:]}")
            time.sleep(0.1)

    def __enter__(self) -> Self:
        """Ready, or RuntimeError and gone."""
        try:
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pids(self) -> dict[str, int]:
        """Process by role (`encode`, `language`, or `encode + language` when they share one); needs --debug."""
        with direct.open(f"http://127.0.0.1:{self.port}/debug/processes", timeout=30) as response:
            entries = json.load(response)["processes"]
        roles: dict[int, list[str]] = {}
        for entry in entries:
            roles.setdefault(entry["pid"], []).append(entry["role"])
        return {" + ".join(sorted(names)): pid for pid, names in roles.items() if names != ["frontend"]}

    def post(self, body: bytes) -> dict[str, Any]:
        """One chat request, not streamed."""
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with direct.open(request, timeout=300) as response:
            return json.load(response)

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)

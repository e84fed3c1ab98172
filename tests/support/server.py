"""A served system under torchrun, for tests: free ports, a deadline on every wait, children ended by pid."""

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
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from qwen3vl_disagg.transport.sockets import address_text

REPO = Path(__file__).parent.parent.parent


def free_port() -> int:
    """One that the kernel gives to no connection by itself: until the server binds it, it stays free."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class Job:
    """`torchrun --nproc-per-node WORLD recipes/SCRIPT ...` as a context manager.

    Leaving the block ends it with SIGTERM, then SIGKILL for what is left. `prefix` stands before the whole command,
    `torchrun` are more options of torchrun's own, `env` more of the environment. `command` stands in place of
    torchrun and the script.
    """

    def __init__(
        self,
        script: str,
        world: int,
        *args: str,
        prefix: Sequence[str] = (),
        torchrun: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = (),
    ) -> None:
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log", prefix=f"{script}-", delete=False)  # noqa: SIM115 - till the end
        agent = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
        agent += torchrun or [f"--master-port={free_port()}"]
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [*prefix, *(command or [*agent, f"recipes/{script}"]), *args],
            cwd=REPO,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            start_new_session=True,
        )
        self.pids: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remember_pids()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.log.close()

    def output(self) -> str:
        return Path(self.log.name).read_text()

    def wait_for(self, pattern: str, limit_s: float = 60.0) -> re.Match[str]:
        """Until a line of the output matches."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if found := re.search(pattern, self.output(), re.MULTILINE):
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"no line matches {pattern!r}:\n{self.output()[-4000:]}")

    def remember_pids(self) -> None:
        """Every process below torchrun, now."""
        self.pids |= descendants(self.process.pid)

    def alive(self) -> set[int]:
        """Of all processes ever remembered, those that still run."""
        return {pid for pid in self.pids if _is_running(pid)}


class Server(Job):
    """`torchrun --nproc-per-node WORLD recipes/serve.py ...`, ready when the block begins. `port`: 0 for any."""

    def __init__(
        self, world: int, *args: str, ready_s: float = 120.0, host: str = "127.0.0.1", port: int = 0, **options: Any
    ) -> None:
        self.world, self.ready_s = world, ready_s
        self.host, self.port = host, port or free_port()
        where = ["--host", host, "--port", str(self.port)]
        super().__init__("serve.py", world, *where, "--debug", *args, **options)
        self.seconds_to_ready = float("nan")

    def __enter__(self) -> Self:
        try:
            self.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def url(self) -> str:
        return f"http://{address_text((self.host, self.port))}"

    def wait_ready(self) -> None:
        """Until the ready line stands in the output."""
        self.wait_for(rf"^ready: {re.escape(self.url)}$", self.ready_s)
        self.seconds_to_ready = time.monotonic() - self.started
        self.remember_pids()

    @property
    def hub(self) -> str:
        """HOST:PORT, as the server says where `--hub` was given."""
        return self.wait_for(r"^hub: (\S+)$")[1]

    def processes(self) -> list[dict[str, Any]]:
        """Pids and roles, as the server says."""
        answer = self.get("/debug/processes")
        return answer["processes"] if isinstance(answer, dict) else answer

    def get(self, path: str, timeout: float = 30.0) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
            return json.load(response)

    def post(self, path: str, body: Any, timeout: float = 120.0) -> tuple[int, Any]:
        """Status and parsed body, also of an error."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def chat(self, content: Any, timeout: float = 120.0, **fields: Any) -> tuple[int, Any]:
        """One user turn, greedy, with token ids and logprobs."""
        body = {
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 64,
            "logprobs": True,
            "top_logprobs": 1,
            "return_token_ids": True,
        }
        return self.post("/v1/chat/completions", {**body, **fields}, timeout)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    """Pids of all children of children of `pid`."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue  # it ended meanwhile
    found, frontier = set[int](), {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - found
        found |= frontier
    return found

"""The server under torchrun, and encode ranks that join it: started, found, ended."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3vl_disagg.cluster.slots import die_with_parent
from qwen3vl_disagg.core.environment import TOKEN
from tools.bench_served import REPO, free_port
from tools.chaos_parts.far_host import FarHost
from tools.chaos_parts.processes import Process, descendants, is_alive, look, send

READY_S, LEAVE_S, ASK_S = 240.0, 45.0, 10.0
ENCODE = ("--block-size", "16", "--embedding-cache-mib", "16", "--dtype", "float32")
SMALL = (*ENCODE, "--blocks", "6", "--kv-cache-gib", "0.008", "--max-running", "8", "--max-waiting", "24")
"""Sizes with which grants are resumed, requests preempted, bursts refused, and caches full after some minutes."""


@dataclass(frozen=True)
class Rank:
    """`name`: role and number, `frontend` without one."""

    name: str
    role: str
    number: int
    process: Process


class Command:
    """A process of ours with all below it; ended by the kernel when this one is. Start it on the main thread: the
    kernel takes the end of the thread for that of the process."""

    def __init__(self, command: Sequence[str], log: Path, token: str) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                cwd=REPO,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", TOKEN: token},
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
            )
        self._seen: dict[int, Process] = {}

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def remember(self) -> dict[int, Process]:
        """What is below it now; it is looked for again at the end."""
        below = {} if self.has_ended() else descendants(self.process.pid)
        self._seen |= below
        return below

    def left_over(self) -> list[int]:
        return [process.pid for process in self._seen.values() if is_alive(process)]

    def end(self, limit_s: float = LEAVE_S) -> list[int]:
        """By SIGTERM; the pids of what had to be killed after that."""
        self.remember()
        for process in self._seen.values():
            send(process, signal.SIGCONT)
        if not self.has_ended():
            self.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + limit_s
        while (not self.has_ended() or self.left_over()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.kill()

    def kill(self) -> list[int]:
        """At once; the pids that there were."""
        self.remember()
        pids = self.left_over() + ([] if self.has_ended() else [self.process.pid])
        if not self.has_ended():
            self.process.kill()
        for process in self._seen.values():
            send(process, signal.SIGKILL)
        self.process.wait(20)
        return pids


class Server:
    """`torchrun recipes/serve.py`, always on the same ports, with the encode ranks that joined it."""

    def __init__(self, world: int, encode_ranks: int, request_timeout_s: float, far: FarHost) -> None:
        self.port, self._far = free_port(), far
        self._hub = f"{far.near}:{free_port()}"
        self._folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.log, self._token = self._folder / "server.log", secrets.token_hex(16)
        self._options = [f"--nproc-per-node={world}", "recipes/serve.py", "--encode-ranks", str(encode_ranks)]
        self._options += ["--port", str(self.port), "--hub", self._hub, "--debug", *SMALL]
        self._options += ["--request-timeout", str(request_timeout_s)]
        self.num_encode = encode_ranks
        self.command: Command | None = None
        self.joined: list[Command] = []
        self._num_joined = 0

    def start(self) -> None:
        """Until it is ready; RuntimeError if that does not come."""
        begun = self.log.stat().st_size if self.log.exists() else 0
        launch = [sys.executable, "-m", "torch.distributed.run", f"--master-port={free_port()}"]
        self.command = Command([*launch, *self._options], self.log, self._token)
        deadline = time.monotonic() + READY_S
        while not re.search(rb"^ready: ", self.log.read_bytes()[begun:], re.MULTILINE):
            if self.command.has_ended() or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not come up:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)
        self.command.remember()

    def has_ended(self) -> bool:
        return self.command is None or self.command.has_ended()

    def get(self, path: str, timeout_s: float = ASK_S) -> Any:
        """The JSON there, also of a 503; OSError or ValueError if nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=timeout_s) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def ranks(self) -> list[Rank]:
        """As the frontend has them, but for those that have died since. OSError if there is none."""
        try:
            entries = self.get("/debug/processes")["processes"]
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(f"/debug/processes says something else: {error!r}") from None
        found = []
        for entry in entries:
            process, number = look(entry["pid"]), entry.get("rank", -1)
            if process is not None and not process.is_zombie:
                name = f"{entry['role']} {number}" if number >= 0 else entry["role"]
                found.append(Rank(name, entry["role"], number, process))
        return sorted(found, key=lambda rank: (rank.role, rank.number))

    def join(self) -> None:
        """One more encode rank, on the other host if there is one."""
        self._num_joined += 1
        command = [*self._far.prefix, sys.executable, "recipes/encode.py", "--join", self._hub, *ENCODE]
        log = self._folder / f"joined-{self._num_joined}.log"
        self.joined.append(Command(command, log, self._token))

    def forget_ended(self) -> list[tuple[str, int]]:
        """Joined ranks that have ended: log and exit status."""
        ended = [one for one in self.joined if one.has_ended()]
        self.joined = [one for one in self.joined if one not in ended]
        return [(one.log.name, one.process.returncode) for one in ended]

    def commands(self) -> list[Command]:
        return [*([self.command] if self.command else []), *self.joined]

    def is_whole(self) -> bool:
        """It is ready, and no rank of its own is missing."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            state = self.get("/ready")
            return bool(state.get("ready")) and not state.get("degraded")
        return False

    def end(self) -> list[str]:
        """What was wrong with how it went. Whatever happens, nothing is left."""
        troubles = []
        for command in self.commands():
            command.remember()
        if self.command is not None and (killed := self.command.end()):
            troubles.append(f"{len(killed)} processes of the server had to be killed {LEAVE_S:.0f} s after SIGTERM")
        for joined in self.joined:
            if killed := joined.end():
                troubles.append(f"{len(killed)} processes of a joined rank had to be killed")
        return troubles

    def kill(self) -> None:
        for command in self.commands():
            command.kill()

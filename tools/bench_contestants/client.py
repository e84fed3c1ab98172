"""The bench's side of a contestant: starts it, asks it, and counts what it used."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tools.bench_contestants.worker import Setup
from tools.bench_machine import busy_seconds, cpu_seconds, family, memory

SETTLE_S, STILL_S, STILL_CORES = 8.0, 0.3, 0.1
REPO = Path(__file__).resolve().parent.parent.parent


class ContestantError(Exception):
    """It did not load, answer in time, or measure; the message ends with what it said last."""


@dataclass(frozen=True)
class Answer:
    """A measurement, and the cores that were busy meanwhile: the contestant's own, those of the contestants that had
    nothing to do, and all others'."""

    result: Any
    wall_s: float
    cores: float
    idle_cores: float
    other_cores: float


class Process:
    """One contestant in a process of its own. `close` ends it and all that it started."""

    def __init__(self, name: str, command: Sequence[str], setup: Setup, env: dict[str, str]) -> None:
        self.name = name
        self.log = tempfile.NamedTemporaryFile("w+", prefix="bench-", suffix=".log")  # noqa: SIM115 - till the end
        self.process = subprocess.Popen(
            [*command, json.dumps(asdict(setup))],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=env,
            start_new_session=True,
        )
        self._rest = b""

    def wait_loaded(self, timeout_s: float) -> dict[str, Any]:
        """What it says of itself once it is ready."""
        return self._read(timeout_s)

    def ask(self, timeout_s: float, **command: Any) -> Any:
        """One command; the contestant's answer."""
        pipe = self._pipe(self.process.stdin)
        pipe.write(json.dumps(command).encode() + b"\n")
        pipe.flush()
        return self._read(timeout_s)

    def _read(self, timeout_s: float) -> Any:
        fd, end = self._pipe(self.process.stdout).fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            readable, _, _ = select.select([fd], [], [], max(0.0, end - time.monotonic()))
            if not readable:
                raise ContestantError(f"{self.name}: no answer within {timeout_s:.0f} s\n{self.last_words()}")
            piece = os.read(fd, 1 << 20)
            if not piece:
                raise ContestantError(f"{self.name}: ended with status {self._status()}\n{self.last_words()}")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise ContestantError(f"{self.name}: {answer['error']}\n{self.last_words()}")
        return answer["result"]

    def _status(self) -> int | None:
        """Exit status of a process that has closed its end; None if it has not ended after all."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        return self.process.poll()

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        if pipe is None:
            raise RuntimeError("the process was started without pipes")
        return pipe

    def last_words(self, limit: int = 1500) -> str:
        """The end of its stderr."""
        return Path(self.log.name).read_text(errors="replace")[-limit:]

    def memory(self) -> dict[str, int]:
        return memory(family(self.process.pid))

    def close(self) -> None:
        """Let it end by itself, then end what is left of its group."""
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            self._pipe(self.process.stdin).close()
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self.log.close()


def settle(everyone: Sequence[Process]) -> None:
    """Wait until no contestant uses the CPU any more: some spin for a second or so after they had something to do."""
    end, pids = time.monotonic() + SETTLE_S, set[int]().union(*(family(process.process.pid) for process in everyone))
    while time.monotonic() < end:
        before = cpu_seconds(pids)
        time.sleep(STILL_S)
        if cpu_seconds(pids) - before <= STILL_CORES * STILL_S:
            return


def ask_alone(asked: Process, everyone: Sequence[Process], timeout_s: float, **command: Any) -> Answer:
    """One command to one contestant, once all of them are still."""
    settle(everyone)
    families = {process: family(process.process.pid) for process in everyone}
    before = {process: cpu_seconds(pids) for process, pids in families.items()}
    busy, started = busy_seconds(), time.perf_counter()
    result = asked.ask(timeout_s, **command)
    wall = time.perf_counter() - started
    busy = busy_seconds() - busy
    used = {process: cpu_seconds(pids) - before[process] for process, pids in families.items()}
    own, idle = used[asked], sum(seconds for process, seconds in used.items() if process is not asked)
    return Answer(result, wall, own / wall, idle / wall, max(0.0, busy - own - idle) / wall)

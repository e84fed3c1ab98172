"""While one client does its worst, the others do not notice: the whole job, on 8 ranks."""

from __future__ import annotations

import http.client
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.http import sse_lines
from tests.support.server import REPO, Server
from tests.support.worst_client import SILENT, WORST

WORLD = 8
NUM_STREAMS = 2
QUIET_S = 30.0
ATTACK_S = float(os.environ.get("Q3VL_ATTACK_S", "6"))
HEALTH_S = 0.5
MEMORY_MIB = 256
NAMES = os.environ.get("Q3VL_ATTACKS", "").split(";") if os.environ.get("Q3VL_ATTACKS") else [*WORST, *SILENT]
ASK: dict[str, Any] = {
    "messages": [{"role": "user", "content": "count"}],
    "stream": True,
    "max_tokens": 300,
    "ignore_eos": True,
    "temperature": 0,
}


class Others:
    """What other clients see: streams one after the other, and the state of the server five times a second."""

    def __init__(self, server: Server, frontend: int) -> None:
        self.server, self.frontend = server, frontend
        self.gaps: list[tuple[float, float]] = []
        self.health: list[tuple[float, float]] = []
        self.memory: list[tuple[float, float]] = []
        self.errors: list[str] = []
        self.done = threading.Event()
        work = [self._stream] * NUM_STREAMS + [self._look]
        self._threads = [threading.Thread(target=self._guard, args=(one,), daemon=True) for one in work]

    def __enter__(self) -> Others:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        for thread in self._threads:
            thread.join(60)

    def _guard(self, work: Any) -> None:
        while not self.done.is_set():
            try:
                work()
            except Exception as error:
                self.errors.append(f"{work.__name__}: {type(error).__name__}: {error}")
                time.sleep(0.5)

    def _stream(self) -> None:
        last = None
        for line in sse_lines(self.server.url + "/v1/chat/completions", ASK):
            if '"content"' in line and '"role"' not in line:
                now = time.monotonic()
                if last is not None:
                    self.gaps.append((now, now - last))
                last = now
            if '"error"' in line:
                self.errors.append(line)
            if self.done.is_set():
                return

    def _look(self) -> None:
        started = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        self.health.append((started, time.monotonic() - started))
        if self.server.get("/ready")["degraded"]:
            self.errors.append(f"a rank is missing: {self.server.get('/ready')}")
        self.memory.append((started, rss_mib(self.frontend)))
        time.sleep(0.2)

    def since(self, start: float, end: float | None = None) -> dict[str, float]:
        def within(values: list[tuple[float, float]]) -> list[float]:
            return [value for at, value in values if start <= at < (end or float("inf"))] or [float("inf")]

        gaps = within(self.gaps)
        return {
            "p50": statistics.median(gaps),
            "p99": percentile(gaps, 0.99),
            "worst": max(gaps),
            "count": len(gaps),
            "health": max(within(self.health)),
            "memory": max(within(self.memory)),
        }


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"{pid} has no memory")


def row(name: str, seen: dict[str, float]) -> str:
    return (
        f"{name:50} gaps p50 {seen['p50'] * 1e3:6.0f} p99 {seen['p99'] * 1e3:6.0f} worst {seen['worst'] * 1e3:6.0f} ms "
        f"({seen['count']:4.0f})  health {seen['health'] * 1e3:5.0f} ms  frontend {seen['memory']:5.0f} MiB"
    )


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_one_client_does_its_worst():
    with Server(WORLD) as server:
        frontend = next(entry["pid"] for entry in server.processes() if entry["role"] == "frontend")
        ranks = {(entry["role"], entry.get("rank")): entry["pid"] for entry in server.processes()}
        assert server.chat("hello")[0] == 200
        with Others(server, frontend) as others:
            time.sleep(2)
            start = time.monotonic()
            time.sleep(QUIET_S)
            quiet = others.since(start)
            print("\n" + row("quiet", quiet), flush=True)
            begun = time.monotonic()
            for name in NAMES:
                start = time.monotonic()
                run_attack(server.port, name)
                print(row(name, others.since(start)), flush=True)
            seen = others.since(begun)
            print(row("all", seen), flush=True)
            attacker = start_attack(server.port, "13 MB of text", 30)
            time.sleep(2)
        print("\n".join(others.errors[:20]))
        lines = server.output().splitlines()
        told = [n for n, line in enumerate(lines) if "hub" in line or "lost" in line or "Traceback" in line]
        print("\n".join(line for n in told for line in lines[n : n + 30]))
        assert ranks == {(entry["role"], entry.get("rank")): entry["pid"] for entry in server.processes()}
        asked_to_end = time.monotonic()
        server.process.terminate()
        server.process.wait(35)
        print(f"SIGTERM during an attack: gone after {time.monotonic() - asked_to_end:.1f} s")
        attacker.kill()
        attacker.wait()
        assert not server.alive()
    assert not others.errors
    assert not told
    assert seen["health"] < HEALTH_S
    assert seen["memory"] < quiet["memory"] + MEMORY_MIB
    assert seen["p99"] <= 2 * quiet["p99"]


def start_attack(port: int, name: str, seconds: float) -> subprocess.Popen[bytes]:
    """In a process of its own that has the last of the cores: it stands for one on another machine."""
    command = ["nice", "-n", "19", sys.executable, "-m", "tests.support.worst_client", str(port), name, str(seconds)]
    return subprocess.Popen(command, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)})


def run_attack(port: int, name: str) -> None:
    process = start_attack(port, name, ATTACK_S)
    assert process.wait(ATTACK_S + 60) == 0

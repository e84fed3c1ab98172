"""Language ranks that share experts: what the death of one does to the others, and to those who wait."""

from __future__ import annotations

import os
import signal
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.scenes import ask_scenes
from tests.support.server import Server

TYPED = {"unavailable", "language_rank_lost", "transfer_failed"}
WITHIN_S = 5.0


def rank_pids(server: Server, role: str) -> dict[int, int]:
    return {p["rank"]: p["pid"] for p in server.processes() if p["role"] == role}


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask(server: Server, content: object) -> tuple[float, int | str, object]:
    """When the answer came, its status, and the error's code if there is one."""
    try:
        status, body = server.chat(content, max_tokens=2000, ignore_eos=True)
    except (ConnectionError, urllib.error.URLError) as error:
        return time.monotonic(), "refused", str(error)
    return time.monotonic(), status, body.get("error", {}).get("code")


@pytest.mark.parametrize(
    ("world", "encode_ranks"), [(3, 1), pytest.param(8, 2, marks=[pytest.mark.acceptance, pytest.mark.timeout(300)])]
)
def test_a_language_rank_is_killed_and_everybody_hears_of_it(tmp_path, world, encode_ranks):
    asked = ask_scenes(tmp_path, seed=7, count=8)
    with Server(world, "--encode-ranks", str(encode_ranks)) as server, ThreadPoolExecutor(8) as pool:
        assert server.chat(asked[0].content())[0] == 200
        time.sleep(0.5)
        pids = rank_pids(server, "language").values()
        before = sum(map(cpu_seconds, pids))
        time.sleep(2.0)
        assert sum(map(cpu_seconds, pids)) - before < 0.1 * len(pids), "idle ranks do not sleep"
        futures = [pool.submit(ask, server, entry.content()) for entry in asked]
        time.sleep(1.5)
        assert not any(future.done() for future in futures)
        victim = max(rank_pids(server, "language").items())[1]
        server.remember_pids()
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        ends = [future.result(60) for future in futures]
        print(f"every request ended within {max(at for at, _, _ in ends) - killed:.2f} s of the death")
        for at, status, code in ends:
            assert status == 503, (status, code)
            assert code in TYPED
            assert at - killed < WITHIN_S
        assert server.process.wait(40) != 0
        deadline = time.monotonic() + 5
        while server.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server.alive()

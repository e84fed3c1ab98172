"""Language ranks that share experts: what the death of one does to the others, and to those who wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.running import wait_for
from tests.support.scenes import ask_scenes
from tests.support.server import REPO, Server

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
        assert time.monotonic() - killed < 4 * WITHIN_S  # torchrun itself takes a second or two to say so
        deadline = time.monotonic() + 5
        while server.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server.alive()


def ask_again(server: Server, content: object) -> tuple[int, list[int], str | None]:
    """Status, tokens and the error's code."""
    status, body = server.chat(content, max_tokens=300, ignore_eos=True)
    return status, body["choices"][0]["token_ids"] if status == 200 else [], body.get("error", {}).get("code")


@pytest.mark.parametrize("num_deaths", [1, pytest.param(20, marks=[pytest.mark.acceptance, pytest.mark.timeout(900)])])
def test_a_language_rank_without_experts_is_started_again(tmp_path, num_deaths):
    """Requests of the other one go on; afterwards both answer as before."""
    folder = tmp_path / "dense"
    make = [sys.executable, "tools/make_checkpoint.py", "--out", str(folder), "--preset", "tiny-random-dense"]
    subprocess.run(make, cwd=REPO, check=True, timeout=60)
    asked = [entry.content() for entry in ask_scenes(tmp_path, seed=7, count=4)]
    with Server(3, "--encode-ranks", "1", "--model", str(folder)) as server, ThreadPoolExecutor(8) as pool:
        before = [ask_again(server, content) for content in asked]
        assert {status for status, _, _ in before} == {200}
        for death in range(num_deaths):
            victim = 1 + death % 2  # also the first one: no store of others is in it
            pid = rank_pids(server, "language")[victim]
            futures = [pool.submit(ask_again, server, content) for content in asked]
            time.sleep(0.2)
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            during = [future.result(60) for future in futures]
            for (status, tokens, code), mine in zip(during, before, strict=True):
                assert (status, tokens) == mine[:2] or (status, code) == (503, "unavailable")
            assert {status for status, _, _ in during} == {200, 503}
            wait_for(lambda: rank_pids(server, "language").get(victim, pid) != pid, 40)  # noqa: B023
            wait_for(lambda: not server.get("/ready")["degraded"], 20)
            print(f"death {death + 1}: whole again after {time.monotonic() - killed:.1f} s")
            assert [ask_again(server, content) for content in asked] == before
        assert server.process.poll() is None

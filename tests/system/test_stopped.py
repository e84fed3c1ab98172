"""SIGSTOP, for as long as matters, to each process of a job under load: requests are right or end typed, and afterwards
the job is whole, without a restart, or with one that was said."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.scenes import Asked, ask_scenes
from tests.support.server import Server
from tools.chaos_parts.processes import look

pytestmark = pytest.mark.acceptance
TOKENS, CLIENTS, TIMEOUT_S, WHOLE_S = 12, 4, 30, 90
TYPED = {429, 503, 504}


@dataclass
class Load:
    """Clients that ask one question after another and check every answer."""

    server: Server
    asked: list[Asked]
    expected: list[list[int]]
    ends: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self, number: int) -> None:
        turn = number
        while not self.is_over.is_set():
            turn += 1
            started = time.monotonic()
            end = self.ask(turn % len(self.asked))
            with self.lock:
                self.ends[end] += 1
                self.longest = max(self.longest, time.monotonic() - started)
            if end != "right":
                self.is_over.wait(0.5)

    def ask(self, which: int) -> str:
        content: Any = self.asked[which].content()
        try:
            status, body = self.server.chat(content, timeout=2 * TIMEOUT_S, max_tokens=TOKENS, ignore_eos=True)
        except OSError as error:  # nobody said anything: a death of the frontend, or worse
            return f"cut: {type(error).__name__}"
        if status == 200:
            is_right = body["choices"][0]["token_ids"] == self.expected[which]
            return "right" if is_right else "WRONG"
        return f"{status} {body['error']['code']}" if status in TYPED else f"UNTYPED {status}"


@pytest.fixture(scope="module")
def load(tmp_path_factory) -> Iterator[Load]:
    asked = ask_scenes(tmp_path_factory.mktemp("scenes"), seed=9, count=10)
    sampling = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
    llm = LLM()
    expected = [answer.token_ids for answer in llm.chat([entry.messages() for entry in asked], sampling)]
    with Server(3, "--encode-ranks", "2", "--request-timeout", str(TIMEOUT_S)) as server:
        yield Load(server, asked, expected)
        server.remember_pids()
    assert not server.alive()


def pids(server: Server) -> dict[str, int]:
    """Name -> pid of what the frontend knows, of the slots above and of the keeper."""
    found = {f"{one['role']} {one['rank']}" if "rank" in one else one["role"]: one["pid"] for one in server.processes()}
    slots = {f"slot of {name}": look(pid).parent for name, pid in found.items()}
    first = slots["slot of frontend"]
    server.remember_pids()
    below = [pid for pid in server.pids if (process := look(pid)) is not None and process.parent == first]
    [keeper] = set(below) - set(found.values())
    return {**found, **slots, "keeper": keeper}


def is_whole(server: Server) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError):
        state = server.get("/ready", timeout=5)
        return bool(state["ready"]) and not state.get("degraded")
    return False


@pytest.mark.parametrize(
    ("who", "seconds", "is_restarted"),
    [
        ("encode 0", 15, False),
        ("encode 1", 65, False),
        ("language 2", 15, False),
        ("frontend", 14, False),
        ("frontend", 30, True),
        ("keeper", 30, False),
        ("slot of frontend", 30, False),
        ("slot of language 2", 65, False),
    ],
)
def test_a_process_that_stands_still(load, who, seconds, is_restarted):
    server = load.server
    load.ends, load.longest, load.is_over = Counter(), 0.0, threading.Event()
    before, said = pids(server), len(server.output())
    clients = [threading.Thread(target=load.run, args=(number,), daemon=True) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(2)
    os.kill(before[who], signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(before[who], signal.SIGCONT)
    went_on = time.monotonic()
    while not is_whole(server) and time.monotonic() - went_on < WHOLE_S:
        time.sleep(0.2)
    whole_s = time.monotonic() - went_on
    time.sleep(3)
    load.is_over.set()
    for client in clients:
        client.join(3 * TIMEOUT_S)
        assert not client.is_alive(), "a request hangs"
    after, log = pids(server), server.output()[said:]
    changed = sorted(name for name in before if before[name] != after.get(name))
    times = f"longest {load.longest:.1f} s, whole after {whole_s:.1f} s"
    print(f"{who}, {seconds} s: {dict(load.ends)}, {times}, new: {changed}")
    print("\n".join(line for line in log.splitlines() if "request" not in line and "busy" not in line)[-1500:])
    assert is_whole(server)
    assert load.ends["WRONG"] == 0
    assert not [end for end in load.ends if end.startswith("UNTYPED")]
    assert load.ends["right"] > 20
    assert all(load.ask(which) == "right" for which in range(len(load.asked)))
    assert bool(changed) == is_restarted
    assert not changed or "starting it again" in log

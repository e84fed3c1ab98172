"""Clients of a real server that check every answer, and whether its job is whole."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from qwen3vl_disagg import LLM
from qwen3vl_disagg.core.requests import SamplingParams
from tests.support.scenes import Asked, ask_scenes
from tests.support.server import Server

TOKENS, CLIENTS, TIMEOUT_S = 12, 4, 30
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
    clients: list[threading.Thread] = field(default_factory=list)

    @classmethod
    def of(cls, server: Server, asked: list[Asked]) -> Self:
        """Knows the right answers, from one process."""
        sampling = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
        answers = LLM().chat([entry.messages() for entry in asked], sampling)
        return cls(server, asked, [answer.token_ids for answer in answers])

    def __enter__(self) -> Self:
        self.ends, self.longest, self.is_over = Counter(), 0.0, threading.Event()
        self.clients = [threading.Thread(target=self.run, args=(number,), daemon=True) for number in range(CLIENTS)]
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        for client in self.clients:
            client.join(3 * TIMEOUT_S)

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

    def check(self) -> None:
        """Nobody hangs, all were right or ended typed, and the job answers everything now."""
        assert not any(client.is_alive() for client in self.clients), "a request hangs"
        assert self.ends["WRONG"] == 0
        assert not [end for end in self.ends if end.startswith("UNTYPED")]
        assert all(self.ask(which) == "right" for which in range(len(self.asked)))


def is_whole(server: Server) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError):
        state = server.get("/ready", timeout=5)
        return bool(state["ready"]) and not state.get("degraded")
    return False


def wait_whole(server: Server, limit_s: float) -> float:
    """Seconds until it is, at most `limit_s`."""
    began = time.monotonic()
    while not is_whole(server) and time.monotonic() - began < limit_s:
        time.sleep(0.2)
    return time.monotonic() - began


@contextlib.contextmanager
def loaded_server(folder: Path, *options: str) -> Iterator[Load]:
    """Two encode ranks, one language rank of a mixture of experts; leaves nothing."""
    asked = ask_scenes(folder, seed=9, count=10)
    with Server(3, "--encode-ranks", "2", "--request-timeout", str(TIMEOUT_S), *options) as server:
        yield Load.of(server, asked)
        server.remember_pids()
    assert not server.alive()

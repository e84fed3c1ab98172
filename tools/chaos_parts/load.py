"""Clients that ask one question after another, obey Retry-After, and have every answer checked."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence

from tools.chaos_parts.bad_input import JSON, Bad
from tools.chaos_parts.client import Patience, exchange
from tools.chaos_parts.questions import Asked
from tools.chaos_parts.record import Record
from tools.chaos_parts.verdicts import Outcome, Reply, judge

GRACE_S = 20.0
"""Beyond the time that the server has for a request, before it counts as hung: this machine may be busy."""
MOST_WAIT_S, MOST_ATTEMPTS = 60.0, 12
THINK_S, AFTER_CUT_S = 0.3, 1.0
FRESH = 0.6
"""Share of requests with caches of their own: their images go the whole way."""


class Load:
    """Threads end by themselves some time after `stop`; `join` waits for them."""

    def __init__(self, port: int, pool: Sequence[Asked], bad: Sequence[Bad], record: Record, timeout_s: float) -> None:
        self._port, self._pool, self._bad, self._record = port, pool, bad, record
        self._silence_s = timeout_s + GRACE_S
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._num_salts = 0

    # ---- the clients ----

    def start(self, count: int, seed: int) -> None:
        for number in range(count):
            self._spawn(self._client, random.Random(f"client {seed} {number}"))

    def _spawn(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads = [one for one in self._threads if one.is_alive()] + [thread]

    def _client(self, rng: random.Random) -> None:
        while not self._stopping.is_set():
            self.ask_again(rng.choice(self._pool), is_fresh=rng.random() < FRESH)
            self._stopping.wait(rng.uniform(0, THINK_S))

    def stop(self) -> None:
        self._stopping.set()

    def join(self, limit_s: float) -> int:
        """How many have not ended in time: a thread has bounds of its own, so none should."""
        deadline = time.monotonic() + limit_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return sum(thread.is_alive() for thread in self._threads)

    @property
    def most_s(self) -> float:
        """In which a client is done once it was told to stop."""
        return 2 * self._silence_s + 30.0

    # ---- requests ----

    def ask_again(self, asked: Asked, *, is_fresh: bool = False, patience: Patience | None = None) -> Outcome:
        """Until it is answered, or refused too often; each time is a request of its own in the record."""
        for attempt in range(MOST_ATTEMPTS):
            outcome, reply = self.ask(asked, attempt=attempt, is_fresh=is_fresh, patience=patience)
            if outcome.verdict == "cut":
                self._stopping.wait(AFTER_CUT_S)
                break
            if outcome.verdict not in ("refused", "broken"):
                break
            self._stopping.wait(min(float(reply.retry_after or AFTER_CUT_S), MOST_WAIT_S))
            if self._stopping.is_set():
                break
        return outcome

    def ask(
        self,
        asked: Asked,
        *,
        attempt: int = 0,
        is_fresh: bool = False,
        patience: Patience | None = None,
        near: str = "",
    ) -> tuple[Outcome, Reply]:
        body = dict(asked.body)
        if is_fresh:
            with self._lock:
                self._num_salts += 1
                body["cache_salt"] = f"salt {self._num_salts}"
        patience = patience or Patience(self._silence_s)
        sent = json.dumps(body).encode()
        return self._exchange(asked.name, asked.kind, asked.expected, sent, JSON, patience, attempt, near)

    def send_bad(self, bad: Bad, near: str = "") -> Outcome:
        patience = Patience(self._silence_s)
        return self._exchange(bad.name, "bad input", None, bad.body, bad.headers, patience, 0, near)[0]

    def _exchange(
        self,
        name: str,
        kind: str,
        expected: Sequence[str] | None,
        body: bytes,
        headers: dict[str, str],
        patience: Patience,
        attempt: int,
        near: str,
    ) -> tuple[Outcome, Reply]:
        start = self._record.now()
        reply = exchange(self._port, body, headers, patience)
        verdict, note = judge(expected, reply)
        code = str((reply.error or {}).get("code", "")) if reply.is_typed else ""
        end = self._record.now()
        outcome = Outcome(
            *(round(start, 3), round(end, 3), name, kind, verdict, reply.status, code, note, attempt, near),
            seconds_to_first=reply.seconds_to_first,
        )
        self._record.outcome(outcome)
        return outcome, reply

    # ---- what events ask for ----

    def burst(self, count: int, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(count):
            asked, is_fresh = rng.choice(self._pool), rng.random() < FRESH
            self._spawn(lambda asked=asked, fresh=is_fresh: self.ask_again(asked, is_fresh=fresh))

    def bad_input(self, count: int, first: int) -> None:
        for number in range(first, first + count):
            self._spawn(self.send_bad, self._bad[number % len(self._bad)])

    def hang_up(self, after_s: Sequence[float], seed: int) -> None:
        rng = random.Random(seed)
        for seconds in after_s:
            asked = rng.choice(self._pool)
            patience = Patience(self._silence_s, leave_after_s=seconds)
            self._spawn(lambda asked=asked, patience=patience: self.ask(asked, is_fresh=True, patience=patience))

    def slow(self, count: int, pause_s: float, seed: int) -> None:
        rng = random.Random(seed)
        streamed = [asked for asked in self._pool if asked.body.get("stream")] or list(self._pool)
        for _ in range(count):
            asked = rng.choice(streamed)
            patience = Patience(self._silence_s, pause_s=pause_s)
            self._spawn(lambda asked=asked, patience=patience: self.ask_again(asked, patience=patience))

"""Clients that ask one question after another, whatever happens to the server meanwhile."""

from __future__ import annotations

import http.client
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from tests.support.scenes import Asked
from tests.support.server import Server


def ask(server: Server, entry: Asked, timeout_s: float = 120.0) -> tuple[int | str, Any]:
    """Status and body; `gone` and the error where the connection broke, or nothing came for so long."""
    try:
        return server.chat(entry.content(), timeout_s)
    except (OSError, http.client.HTTPException) as error:
        return "gone", error


class Asking:
    """Clients that go on asking until the block ends; `answers` are (question, asked at, status, body, seconds)."""

    def __init__(self, server: Server, asked: list[Asked], at_once: int = 6, timeout_s: float = 120.0) -> None:
        self._server, self._asked, self._at_once, self._timeout_s = server, asked, at_once, timeout_s
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(at_once)
        self.answers: list[tuple[int, float, int | str, Any, float]] = []

    def _ask(self, client: int) -> None:
        for n in itertools.count(client, self._at_once):
            if self._stopping.is_set():
                return
            question, started = n % len(self._asked), time.monotonic()
            status, body = ask(self._server, self._asked[question], self._timeout_s)
            self.answers.append((question, started, status, body, time.monotonic() - started))

    def __enter__(self) -> Self:
        for client in range(self._at_once):
            self._pool.submit(self._ask, client)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._pool.shutdown()

    def since(self, moment: float) -> list[Any]:
        """Bodies of the good answers to what was asked after this moment."""
        return [body for _, started, status, body, _ in list(self.answers) if started > moment and status == 200]

"""An app on a loopback port, on an event loop of its own thread, and how late that loop was."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Self

from starlette.types import ASGIApp

from qwen3vl_disagg.serving.app import create_app
from qwen3vl_disagg.serving.http_server import HttpServer
from qwen3vl_disagg.serving.limits import Limits
from tests.support.fake_backend import FakeBackend, tiny_processor

PROBE_S = 0.01


class RunningApp:
    """Serves `app` until the block ends. `beside`: what else runs on the same loop."""

    def __init__(
        self, app: ASGIApp, *, beside: Callable[[], Coroutine[Any, Any, None]] | None = None, **options: Any
    ) -> None:
        self.server = HttpServer(app, **{"graceful_s": 5, **options})
        self.sock = socket.socket()
        self.sock.bind(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._beside, self._late = beside, [0.0]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        tasks = [asyncio.create_task(self._probe())]
        if self._beside is not None:
            tasks.append(asyncio.ensure_future(self._beside()))
        try:
            await self.server.serve(self.sock)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _probe(self) -> None:
        while True:
            due, used = time.monotonic() + PROBE_S, time.thread_time()
            await asyncio.sleep(PROBE_S)
            # What other processes took of the core meanwhile is not the loop's.
            self._late.append(min(time.monotonic() - due, time.thread_time() - used))

    @contextlib.contextmanager
    def lateness(self) -> Iterator[list[float]]:
        """Filled, when the block ends, with how late the loop's timers were during it, in seconds."""
        found: list[float] = []
        first = len(self._late)
        yield found
        seen = len(self._late)
        wait_for(lambda: len(self._late) > seen + 1, 60.0)  # the loop may be standing still now
        found.extend(self._late[first:])

    def __enter__(self) -> Self:
        self._thread.start()
        wait_for(lambda: self.server.started, 10.0)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def connect(self, timeout_s: float = 20.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout_s)

    def raw(self, data: bytes, timeout_s: float = 20.0) -> bytes:
        """Send bytes; everything that comes back until the server closes."""
        with self.connect(timeout_s) as sock:
            sock.sendall(data)
            return read_all(sock)


class Running(RunningApp):
    """The application over a backend that plays a script."""

    def __init__(self, backend: FakeBackend, *, options: dict[str, Any] | None = None, **limits: Any) -> None:
        self.backend = backend
        app = create_app(backend, tiny_processor(), model_name="tiny", limits=Limits(**limits))
        super().__init__(app, **(options or {}))


def read_all(sock: socket.socket) -> bytes:
    """Until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := sock.recv(65536):
            received += chunk
    return received


def wait_for(condition: Callable[[], Any], timeout_s: float = 2.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

"""A listening socket on the event loop that survives having no file descriptor left.

asyncio's own server tries `backlog` times in a row to accept at the limit, logs each try and doubles its timers with
it (https://github.com/python/cpython/issues/116372). Here a failed accept ends the turn, and the listener rests.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)
ACCEPTS_PER_TURN = 16
REST_S = 0.5
_BACKLOG = 1024
_SAY_AGAIN_S = 60.0


class Listener:
    """Makes a protocol for each connection on a bound socket, until `close`. `name` stands in the log."""

    def __init__(self, sock: socket.socket, make_protocol: Callable[[], asyncio.BaseProtocol], *, name: str) -> None:
        self._sock, self._make_protocol, self._name = sock, make_protocol, name
        self._loop = asyncio.get_running_loop()
        self._starting: set[asyncio.Task[Any]] = set()
        self._rest: asyncio.TimerHandle | None = None
        self._said_at = -_SAY_AGAIN_S
        sock.setblocking(False)
        sock.listen(_BACKLOG)
        self._resume()

    def close(self) -> None:
        """Take no more connections, and close the socket."""
        if self._rest is not None:
            self._rest.cancel()
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._sock.close()

    async def wait_closed(self) -> None:
        """Until connections that were accepted have their protocols."""
        if self._starting:
            await asyncio.wait(self._starting)

    def _resume(self) -> None:
        self._rest = None
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(error)
                return
            sock.setblocking(False)
            task = self._loop.create_task(self._begin(sock))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    def _begin(self, sock: socket.socket) -> Coroutine[Any, Any, Any]:
        """What becomes of a connection that was accepted."""
        return self._loop.connect_accepted_socket(self._make_protocol, sock)

    def _pause(self, error: OSError) -> None:
        """The socket would stay readable: look away for a while. One line a minute."""
        self._loop.remove_reader(self._sock)
        self._rest = self._loop.call_later(REST_S, self._resume)
        if time.monotonic() - self._said_at >= _SAY_AGAIN_S:
            self._said_at = time.monotonic()
            logger.warning("%s: cannot accept connections: %s", self._name, error.strerror)

"""uvicorn on a socket that is bound already, with our own connections and without its signal handlers."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from qwen3vl_disagg.cluster.last_words import LastWords
from qwen3vl_disagg.serving.http_connection import HttpConnection
from qwen3vl_disagg.serving.http_places import PlaceLimits, Places
from qwen3vl_disagg.serving.http_turns import ParseTurns
from qwen3vl_disagg.transport.listener import Listener

LOOK_TICKS = 3
"""uvicorn ticks every 0.1 s."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, places: Places, words: LastWords | None) -> None:
        super().__init__(config)
        self._places, self._turns, self._words = places, ParseTurns(), words

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Listens, in place of uvicorn's own servers."""
        self.servers = cast(Any, [Listener(sock, self._connection, name="http") for sock in sockets or ()])
        self.started = True

    def _connection(self) -> HttpConnection:
        return HttpConnection(self.config, self.server_state, self._turns, self._places, self._words)

    async def on_tick(self, counter: int) -> bool:
        if counter % LOOK_TICKS == 0:
            self._places.look(time.monotonic())
        return await super().on_tick(counter)


class HttpServer:
    """Serves an app until `shutdown`. Signals are left to the caller.

    `graceful_s`: after `shutdown`, how long running requests may still take before they are cancelled. `places`: how
    many connections there may be; default: what the limit of file descriptors leaves room for. `words`: what is said if
    this process dies.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        graceful_s: float = 20.0,
        places: PlaceLimits | None = None,
        words: LastWords | None = None,
    ) -> None:
        config = uvicorn.Config(
            cast(Any, app),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=max(1, round(graceful_s)),
        )
        # Its warnings are about what clients send: anybody could fill the log.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self.places = Places(places or PlaceLimits.of_process())
        self._server = _Server(config, self.places, words)

    @property
    def started(self) -> bool:
        """Whether connections are taken."""
        return self._server.started

    @property
    def num_connections(self) -> int:
        """Those of clients that left count until their handlers have been told."""
        return len(self._server.server_state.connections)

    async def serve(self, sock: socket.socket) -> None:
        """Serve on a bound socket; returns when everything is closed. The socket is closed then too."""
        await self._server.serve(sockets=[sock])

    def shutdown(self, *, now: bool = False) -> None:
        """Stop taking connections; finish what runs, or with `now` drop it."""
        self._server.should_exit = True
        if now:
            self._server.force_exit = True

"""uvicorn on a socket that is bound already, with our own deadlines and without its signal handlers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any, cast

import h11
import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen3vl_disagg.serving.errors import envelope
from qwen3vl_disagg.serving.limits import MAX_HEADER_BYTES

MAX_CONNECTIONS = 1024
HEADER_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 30.0


class _Protocol(H11Protocol):
    """HTTP/1.1 with a deadline for the headers, a cap on connections, and errors in the envelope."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(503, "too many connections", "overloaded")
            return
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        # IDLE: no whole header has come since the last request ended. uvicorn's keep-alive timer stops at the first
        # byte of the next one, so ours must run from there.
        waits_for_headers = self.conn.their_state is h11.IDLE
        if not waits_for_headers:
            self._stop_header_timer()
        elif self._header_timer is None and self.timeout_keep_alive_task is None:
            self._start_header_timer()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for a request that is not HTTP."""
        self._refuse(400, "the request is not valid HTTP, or its headers are too large", "invalid_http")

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._on_header_timeout)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _on_header_timeout(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self._refuse(408, "the headers came too slowly", "header_timeout")

    def _refuse(self, status: int, message: str, code: str) -> None:
        if self.conn.our_state is h11.IDLE or self.conn.our_state is h11.SEND_RESPONSE:
            body = msgspec.json.encode(envelope(status, message, code=code))
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            if status == 503:
                headers.append((b"retry-after", b"1"))
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves an app until `shutdown`. Signals are left to the caller.

    `graceful_s`: after `shutdown`, how long running requests may still take before they are cancelled.
    """

    def __init__(self, app: ASGIApp, *, graceful_s: float = 20.0) -> None:
        config = uvicorn.Config(
            cast(Any, app),
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(KEEP_ALIVE_S),
            timeout_graceful_shutdown=max(1, round(graceful_s)),
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        self._server = _Server(config)

    @property
    def started(self) -> bool:
        """Whether connections are taken."""
        return self._server.started

    async def serve(self, sock: socket.socket) -> None:
        """Serve on a bound socket; returns when everything is closed. The socket is closed then too."""
        await self._server.serve(sockets=[sock])

    def shutdown(self, *, now: bool = False) -> None:
        """Stop taking connections; finish what runs, or with `now` drop it."""
        self._server.should_exit = True
        if now:
            self._server.force_exit = True

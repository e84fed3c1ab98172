"""One HTTP/1.1 connection: uvicorn's, parsed in turns, and in every phase with a time by which it must get on. And how
many there may be, and who still gets in when all places are taken."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import h11
import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from qwen3vl_disagg.core.errors import UnavailableError
from qwen3vl_disagg.core.host import descriptor_limit
from qwen3vl_disagg.serving.errors import envelope, error_response
from qwen3vl_disagg.serving.http_turns import PARSE_BYTES, Cut, ParseTurns, TurnParser
from qwen3vl_disagg.serving.limits import MAX_HEADER_BYTES

READ_BYTES = 64 * 2**10
"""Read from a socket at a time, and kept of it before it is parsed."""
MAX_LINGER_BYTES = 256 * 2**20
ALWAYS_ANSWERED = ("/health", "/ready")
"""First of all requests, and above the limit of connections."""
URGENT = tuple(f"{method} {path} ".encode() for method in ("GET", "HEAD") for path in ALWAYS_ANSWERED)
SLOW_BODY = 16 * 2**10
"""Bytes a second below which a body's connection may be given to another client."""

MAX_CONNECTIONS = 1024
RESERVED = 64
"""Places of connections above the limit, which may ask how the server is."""
ENDS_PER_LOOK = 64
_OTHER_DESCRIPTORS = 512
"""Kept free for ranks, their pulls of media, and child processes."""
_SEARCH_S = 0.1


@dataclass(frozen=True)
class Patience:
    """Of a phase: after `limit_s` the connection ends; after `yields_s` another client may have its place, if there is
    none other."""

    limit_s: float
    yields_s: float


PHASES = {
    "headers": Patience(10.0, 1.0),  # none whole since the connection was made, or since their first byte
    "idle": Patience(30.0, 1.0),  # between two requests
    "body": Patience(60.0, 5.0),  # the handler has its own, shorter time for it, and answers
    "request": Patience(float("inf"), float("inf")),  # the handler has the request's deadline
    "unread body": Patience(30.0, 1.0),  # answered; the rest of the body is read and dropped
    "closing": Patience(5.0, 1.0),  # answered and closed; what comes is dropped until the client closes too
    "blocked": Patience(30.0, 5.0),  # the client has not read anything for so long
}


class _Socket(asyncio.Transport):
    """The transport as uvicorn sees it. Reading stops when uvicorn wants that, or the connection."""

    def __init__(self, transport: asyncio.Transport, connection: HttpConnection) -> None:
        super().__init__()
        self.transport, self._connection = transport, connection
        self._is_paused, self._is_held = False, False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._connection.is_lingering or self.transport.is_closing()

    def write(self, data: Any) -> None:
        self.transport.write(data)

    def close(self) -> None:
        """A client that is still sending could not read the answer if its bytes met a closed socket (RFC 9112, 9.6)."""
        if self._connection.is_client_sending and not self.is_closing():
            self._connection.linger()
        else:
            self.transport.close()

    def pause_reading(self) -> None:
        self._is_paused = True
        self._apply()

    def resume_reading(self) -> None:
        self._is_paused = False
        self._apply()

    def hold(self, is_held: bool) -> None:
        if is_held != self._is_held:
            self._is_held = is_held
            self._apply()

    def _apply(self) -> None:
        # asyncio ignores what changes nothing, or comes after the end.
        if self._is_paused or self._is_held:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()


class HttpConnection(H11Protocol):
    """See above. Errors of the protocol are answered in the envelope."""

    conn: TurnParser

    def __init__(self, config: Config, server_state: ServerState, turns: ParseTurns, places: Places) -> None:
        super().__init__(config, server_state, {})
        self.conn = TurnParser(MAX_HEADER_BYTES)
        self.is_lingering = False
        self._turns, self._places = turns, places
        self._pending = bytearray()
        self._is_lost = self._has_told = False
        self._num_dropped = 0
        now = time.monotonic()
        self._phase: tuple[str, int, bool] = ("headers", 0, False)
        self._phase_since, self._num_looks = now, 0
        self._num_unsent, self._unsent_since = 0, now

    # ---- asyncio ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._socket = _Socket(transport, self)
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]  # of asyncio's selector transports: 256 KiB else
        super().connection_made(self._socket)
        self._places.take(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The handler hears of it in a turn: hundreds of clients may leave at once."""
        self._is_lost = True
        self._pending.clear()
        self._places.give_back(self)
        self._turns.add(self)

    def data_received(self, data: bytes) -> None:
        if self.is_lingering:
            self._num_dropped += len(data)
            if self._num_dropped > MAX_LINGER_BYTES:
                self._socket.transport.abort()
        elif self.conn.their_state not in (h11.MUST_CLOSE, h11.CLOSED, h11.ERROR):
            self._pending += data
            self._socket.hold(True)
            self._turns.add(self)

    # ---- parsing ----

    @property
    def num_requests(self) -> int:
        return self.conn.num_requests

    @property
    def is_urgent(self) -> bool:
        return not self._is_lost and self._pending.startswith(URGENT)

    @property
    def num_wakes(self) -> int:
        return self.conn.num_requests + self._has_told

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def handle_events(self) -> None:
        """uvicorn calls this where there may be something to parse."""
        self._turns.add(self)

    def take_turn(self) -> bool:
        if self._is_lost:
            if not self._has_told:
                self._has_told = True
                super().connection_lost(None)
            return False
        self.conn.begin_turn()
        while not self._socket.is_closing() and not self._is_lost:
            super().handle_events()
            if self.conn.last is Cut:
                return True
            if self.conn.last is not h11.NEED_DATA or not self._pending:
                break
            self.conn.receive_data(bytes(self._pending[:PARSE_BYTES]))
            del self._pending[:PARSE_BYTES]
        if self._is_lost or self._socket.is_closing() or self.conn.their_state is h11.MUST_CLOSE:
            self._pending.clear()
        self._socket.hold(bool(self._pending))
        return False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # `look` does that, and all else

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for a request that is not HTTP."""
        if self.conn.is_wasteful:
            self.refuse(400, "the body comes in too many, too small chunks", "wasteful_framing")
        else:
            self.refuse(400, "the request is not valid HTTP, or its headers are too large", "invalid_http")

    # ---- the end ----

    def refuse(self, status: int, message: str, code: str) -> None:
        """Answer, if no answer has begun, and close."""
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
                self._socket.write(self.conn.send(event) or b"")
        self._socket.close()

    @property
    def is_client_sending(self) -> bool:
        """Whether more of a request may come that nobody will read."""
        if self._is_lost:
            return False
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or bool(self._pending)

    def linger(self) -> None:
        """Close our side; read and drop what comes until the client has closed its own."""
        self.is_lingering = True
        self._pending.clear()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._socket.hold(False)
        self._socket.resume_reading()
        try:
            self._socket.transport.write_eof()
        except OSError:  # the client has reset the connection, and the loop has not heard of it yet
            self._socket.transport.abort()

    def drop(self) -> None:
        """End at once, for another client's sake."""
        if self._phase[0] == "idle":
            self._socket.transport.close()
        else:
            self._socket.transport.abort()

    def shutdown(self) -> None:
        """The server goes: what runs may end, what is still coming may not."""
        if not self._socket.is_closing() and self._phase_now() == "body":
            self.refuse(503, "the server is shutting down", "unavailable")
        if self._socket.is_closing():
            self._socket.transport.close()
        else:
            super().shutdown()

    # ---- time ----

    def look(self, now: float) -> bool:
        """End the connection if its phase has taken too long; whether it did. Called again and again."""
        num_unsent = self._socket.transport.get_write_buffer_size()
        if num_unsent != self._num_unsent:
            self._num_unsent, self._unsent_since = num_unsent, now
        phase = (self._phase_now(), self.num_requests, num_unsent > 0)
        self._num_looks += 1
        if phase != self._phase:
            self._phase, self._phase_since, self._num_looks = phase, now, 0
        name, since = self._state()
        if now - since < PHASES[name].limit_s:
            return False
        if name == "headers":
            self.refuse(408, "the headers came too slowly", "header_timeout")
        else:
            self.drop()
        return True

    def yields_since(self, now: float) -> float | None:
        """Since when another client may have this one's place; None if it may not."""
        if self._phase_now() != self._phase[0] or self.num_requests != self._phase[1]:
            return None  # it has moved on since it was looked at
        if self._pending or self._num_looks < 2:
            return None  # it was this process that had no time
        name, since = self._state()
        if name == "body" and self.conn.num_body_bytes > SLOW_BODY * (now - since):
            return None
        return since if now - since >= PHASES[name].yields_s else None

    def _state(self) -> tuple[str, float]:
        """The phase that counts, and since when."""
        if self._num_unsent:
            return "blocked", self._unsent_since
        return self._phase[0], self._phase_since

    def _phase_now(self) -> str:
        if self._socket.is_closing():
            return "closing"
        if self.cycle is not None and not self.cycle.response_complete:
            return "body" if self.cycle.more_body else "request"
        if self.conn.their_state is h11.SEND_BODY:
            return "unread body"
        if not self.num_requests or self._pending or self.conn.trailing_data[0]:
            return "headers"
        return "idle"


@dataclass(frozen=True)
class PlaceLimits:
    max_connections: int
    reserved: int

    @classmethod
    def of_process(cls) -> PlaceLimits:
        """Below what the process may open; at most half of that where it is little."""
        limit = descriptor_limit()
        total = min(MAX_CONNECTIONS + RESERVED, limit - min(_OTHER_DESCRIPTORS, limit // 2))
        reserved = min(RESERVED, total // 4)
        return cls(total - reserved, reserved)


class Places:
    """All connections. When there are too many, the one goes that has kept its place for nothing for longest.

    Where nobody does, a new one gets a reserved place: `ALWAYS_ANSWERED` or a 503, and then it is closed. The oldest
    of these goes when there are too many of them.
    """

    def __init__(self, limits: PlaceLimits) -> None:
        self.limits = limits
        self._connections: dict[HttpConnection, None] = {}
        self._reserved: dict[HttpConnection, None] = {}
        self._yielding: deque[HttpConnection] = deque()
        self._searched_at = float("-inf")

    def __len__(self) -> int:
        return len(self._connections) + len(self._reserved)

    def take(self, connection: HttpConnection) -> None:
        if len(self._connections) < self.limits.max_connections or self._make_room():
            self._connections[connection] = None
            return
        if len(self._reserved) >= self.limits.reserved:
            oldest = next(iter(self._reserved))
            del self._reserved[oldest]
            oldest.drop()
        self._reserved[connection] = None
        connection.app = _reserved(connection.app)

    def give_back(self, connection: HttpConnection) -> None:
        self._connections.pop(connection, None)
        self._reserved.pop(connection, None)

    def look(self, now: float) -> None:
        """See `HttpConnection.look`. Ends so many at a time that nothing else waits for it."""
        num_ended = 0
        for connection in [*self._connections, *self._reserved]:
            num_ended += connection.look(now)
            if num_ended >= ENDS_PER_LOOK:
                return

    def _make_room(self) -> bool:
        now = time.monotonic()
        if not self._yielding and now - self._searched_at >= _SEARCH_S:
            self._searched_at = now
            since = {connection: connection.yields_since(now) for connection in self._connections}
            found = [(start, n, connection) for n, (connection, start) in enumerate(since.items()) if start is not None]
            self._yielding.extend(connection for _, _, connection in sorted(found, key=lambda entry: entry[:2]))
        while self._yielding:
            connection = self._yielding.popleft()
            if connection in self._connections and connection.yields_since(now) is not None:
                del self._connections[connection]
                connection.drop()
                return True
        return False


def _reserved(app: ASGIApp) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        if scope["path"] in ALWAYS_ANSWERED:
            await app(scope, receive, send_last)
        else:
            await error_response(UnavailableError("too many connections"))(scope, receive, send_last)

    return answer

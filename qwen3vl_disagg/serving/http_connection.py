"""One HTTP/1.1 connection: uvicorn's, parsed in turns, and in every phase with a time by which it must get on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import weakref
from dataclasses import dataclass
from typing import Any

import h11
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from qwen3vl_disagg.cluster.last_words import LastWords
from qwen3vl_disagg.serving.errors import envelope
from qwen3vl_disagg.serving.http_places import ALWAYS_ANSWERED, Places
from qwen3vl_disagg.serving.http_turns import ParseTurns
from qwen3vl_disagg.serving.http_words import WORDS, HttpWords
from qwen3vl_disagg.serving.limits import MAX_HEADER_BYTES

EVENTS_PER_TURN = 64
PARSE_BYTES = 16 * 2**10
"""Given to the parser at a time: a block of headers costs most, and cannot be parsed in parts."""
MAX_HEADER_LINES = 256
MAX_OVERHEAD = 64 * 2**10
OVERHEAD_SHARE = 8
"""A body may have MAX_OVERHEAD bytes of framing (sizes of chunks, extensions, trailers), and an eighth of its size."""
READ_BYTES = 64 * 2**10
"""Read from a socket at a time, and kept of it before it is parsed."""
MAX_LINGER_BYTES = 256 * 2**20
URGENT = tuple(f"{method} {path} ".encode() for method in ("GET", "HEAD") for path in ALWAYS_ANSWERED)
SLOW_BODY = 16 * 2**10
"""Bytes a second below which a body's connection may be given to another client."""


class Cut:
    """The last event of a turn: there may be more in the buffer."""


class TurnParser(h11.Connection):
    """h11's connection, a bounded number of events at a time, and a bounded framing.

    `last`: what `next_event` said last, `Cut` where the turn was over.
    """

    def __init__(self, max_header_bytes: int) -> None:
        super().__init__(h11.SERVER, max_header_bytes)
        self.last: Any = h11.NEED_DATA
        self.is_wasteful = False
        self.num_requests = 0
        self.num_body_bytes = 0
        """Of the request under way."""
        self._num_left = 0
        self._num_wire_bytes = 0

    def begin_turn(self) -> None:
        self._num_left = EVENTS_PER_TURN

    def receive_data(self, data: bytes) -> None:
        self._num_wire_bytes += len(data)
        super().receive_data(data)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """RemoteProtocolError also for a body whose framing is out of proportion."""
        if not self._num_left:
            self.last = Cut
            return h11.NEED_DATA
        self._num_left -= 1
        if self.their_state is h11.IDLE:
            self._check_header_lines()
        try:
            event = self.last = super().next_event()
        except h11.RemoteProtocolError as error:
            raise error.with_traceback(None) from None  # h11's frames hold the error that holds them
        if isinstance(event, h11.Request):
            self.num_requests += 1
            self.num_body_bytes = self._num_wire_bytes = 0
        elif isinstance(event, h11.Data):
            self.num_body_bytes += len(event.data)
        if self._num_wire_bytes - self.num_body_bytes > MAX_OVERHEAD + self.num_body_bytes // OVERHEAD_SHARE:
            self.is_wasteful = self.their_state is h11.SEND_BODY
            if self.is_wasteful:
                raise h11.RemoteProtocolError("the framing of the body is out of proportion")
        return event

    def _check_header_lines(self) -> None:
        """A parsed line costs a hundred times as much as its bytes."""
        head, _ = self.trailing_data
        end = head.find(b"\n\r\n")
        if head.count(b"\n", 0, end if end >= 0 else len(head)) > MAX_HEADER_LINES:
            raise h11.RemoteProtocolError("too many lines of headers", error_status_hint=431)


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
        # No circle of the two, so that what an ended connection has in memory does not wait for the garbage collector.
        self.transport, self._connection = transport, weakref.proxy(connection)
        self._is_paused, self._is_held = False, False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._connection.is_lingering or self.transport.is_closing()

    def write(self, data: Any) -> None:
        words = self._connection.words
        if words is None:
            self.transport.write(data)
        else:
            words.write(data)

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

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        turns: ParseTurns,
        places: Places,
        last_words: LastWords | None = None,
    ) -> None:
        super().__init__(config, server_state, {})
        self._last_words = last_words
        self.words: HttpWords | None = None
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
        if self._last_words is not None:
            self.words = self.app_state[WORDS] = HttpWords(self._last_words, transport)
        super().connection_made(self._socket)
        self._places.take(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The handler hears of it in a turn: hundreds of clients may leave at once."""
        self._is_lost = True
        if self.words is not None:
            self._end_sending()
            self.words.release()
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

    def _end_sending(self) -> None:
        """The client hears of the end now, whenever the keeper closes its own end."""
        sock = self._socket.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it is over already
            sock.shutdown(socket.SHUT_WR)

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
            num_requests = self.conn.num_requests
            super().handle_events()
            if self.words is not None and self.conn.num_requests > num_requests:
                self.words.request(self.scope["path"])
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

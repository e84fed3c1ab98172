"""Control connections: small typed messages over TCP, one frame each.

A frame is a 4-byte big-endian length and a msgpack body. Whatever does not decode as one of the connection's message
types, or is longer than its limit, ends the connection with a `FrameError`: there is no resynchronising with a peer
that does not speak the protocol. The end of the stream is the fastest sign of a dead peer (15 ms where the data path
says nothing for minutes), so liveness is decided here and never by the payload.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

import msgspec

from qwen3vl_disagg.core.errors import DeadlineError, TransferError
from qwen3vl_disagg.protocol.messages import Heartbeat, HubMessage, LinkMessage, Message
from qwen3vl_disagg.transport.opening import open_streams
from qwen3vl_disagg.transport.sockets import Address, address_text
from qwen3vl_disagg.transport.tls import Tls
from qwen3vl_disagg.transport.tls_streams import CertificateRefused

MAX_LINK_FRAME = 64 * 1024
MAX_HUB_FRAME = 8 * 1024 * 1024
HEARTBEAT_S = 1.0
SILENCE_S = 10.0
"""Generous: ranks that share two cores can stall for seconds."""
ATTEMPT_S = 5.0
"""How long one attempt to connect may take: the kernel would ask again at growing intervals, and a network that is back
would not be seen for half a minute."""
_MAX_CAME = 16
_MAX_UNSENT_BYTES = 64 * 1024 * 1024
_SLICE_BYTES = 256 * 1024
STILL_S = 10.0
"""What moves may go on: raw bytes that were announced end after so long without one more, or without a slice that the
peer has taken; a payload after so long without a tensor, beside its share of the time for all of them."""
FRAME_HEADER_BYTES = 4

_encoder = msgspec.msgpack.Encoder()


class ConnectionLost(TransferError):
    """The peer closed, died, or was silent for too long."""

    code = "connection_lost"


class FrameError(TransferError):
    """The peer sent (or was about to be sent) something that is no frame of this connection."""

    code = "bad_frame"


def encode_frame(message: Message, max_frame: int) -> bytes:
    """Length and body. Raises FrameError if the body is longer than `max_frame` bytes."""
    body = _encoder.encode(message)
    if len(body) > max_frame:
        raise FrameError(f"{type(message).__name__} takes {len(body)} bytes, the limit is {max_frame}")
    return len(body).to_bytes(FRAME_HEADER_BYTES, "big") + body


class Connection:
    """One end of a control connection. Lives on one asyncio loop.

    `keep_alive` starts the heartbeats and the watch over the peer's silence; until then nothing is sent on its own, so
    raw bytes can follow a message (`send_bytes`, `receive_bytes`).
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        messages: Any,
        max_frame: int,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._reader, self._writer = reader, writer
        self._decoder = msgspec.msgpack.Decoder(messages)
        self._max_frame = max_frame
        self._silence_s = silence_s
        self._watch: asyncio.Task[None] | None = None
        self._body_bytes: int | None = None  # of the frame under way: a cancelled receive can be taken up again
        self._came: deque[Any] = deque()  # while `lost` watched
        self._waiting = False
        self._silent_ticks = 0
        self._failure: TransferError | None = None

    @property
    def peer(self) -> Address:
        return tuple(self._writer.get_extra_info("peername") or ("?", 0))[:2]

    @property
    def is_closed(self) -> bool:
        return self._failure is not None or self._writer.is_closing()

    def keep_alive(self, heartbeat_s: float = HEARTBEAT_S) -> Connection:
        """Send a heartbeat every `heartbeat_s` and end the connection when the peer has been silent for too long."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._keep_alive(heartbeat_s))
        return self

    async def _keep_alive(self, heartbeat_s: float) -> None:
        # Silence is counted in ticks of this task, so a stall of this process does not make the peer look dead.
        while not self.is_closed:
            await asyncio.sleep(heartbeat_s)
            self._silent_ticks += 1 if self._waiting else 0
            if self._silent_ticks * heartbeat_s >= self._silence_s:
                self._fail(ConnectionLost(f"peer silent for {self._silence_s:g} s"))
            elif not self.is_closed and not self._writer.transport.get_write_buffer_size():
                self._writer.write(encode_frame(Heartbeat(), self._max_frame))

    def post(self, message: Message) -> None:
        """Queue a message without waiting. Raises ConnectionLost, also when the peer has stopped reading."""
        frame = encode_frame(message, self._max_frame)
        if self.is_closed:
            raise self._failure or ConnectionLost("connection is closed")
        if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            raise self._fail(ConnectionLost("peer does not read"))
        self._writer.write(frame)

    async def send(self, message: Message) -> None:
        """Write a message and wait until the socket's buffer has room again. Raises ConnectionLost, FrameError."""
        self.post(message)
        await self._drain(self._silence_s)

    async def receive(self, timeout: float | None = None, *, heartbeats_count: bool = False) -> Any:
        """The next message that is no heartbeat. Raises ConnectionLost, FrameError, DeadlineError after `timeout`, in
        which `heartbeats_count` or do not."""
        try:
            async with asyncio.timeout(timeout) as clock:
                while True:
                    message = self._came.popleft() if self._came else await self._receive_one()
                    if not isinstance(message, Heartbeat):
                        return message
                    if heartbeats_count and timeout is not None:
                        clock.reschedule(asyncio.get_running_loop().time() + timeout)
        except TimeoutError as error:
            if isinstance(error, DeadlineError):
                raise
            raise DeadlineError(f"no message within {timeout:g} s") from None

    async def lost(self, take: Callable[[Any], bool] = lambda _: False) -> TransferError:
        """Why, as soon as the connection has ended. What comes before that, which is little, `receive` still gets where
        `take` does not say that it has taken it."""
        try:
            while len(self._came) < _MAX_CAME:
                message = await self._receive_one()
                if not isinstance(message, Heartbeat) and not take(message):
                    self._came.append(message)
        except TransferError as error:
            return error
        return self._fail(FrameError("messages in place of an answer"))

    async def _receive_one(self) -> Any:
        if self._body_bytes is None:
            length = int.from_bytes(await self._read(FRAME_HEADER_BYTES), "big")
            if not 0 < length <= self._max_frame:
                raise self._fail(FrameError(f"frame of {length} bytes, the limit is {self._max_frame}"))
            self._body_bytes = length
        body = await self._read(self._body_bytes)
        self._body_bytes = None
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._fail(FrameError(f"frame of {len(body)} bytes does not decode: {error}")) from None

    async def _read(self, num_bytes: int) -> bytes:
        return await self._wait_for(self._reader.readexactly(num_bytes))

    async def _wait_for(self, reading: Coroutine[Any, Any, bytes]) -> bytes:
        if self._failure is not None:
            reading.close()
            raise self._failure
        self._waiting = True
        try:
            data = await reading
        except asyncio.IncompleteReadError as error:
            cut = f" in the middle of a frame ({len(error.partial)} of {error.expected} bytes)" if error.partial else ""
            raise self._fail(ConnectionLost(f"peer closed the connection{cut}")) from None
        except OSError as error:
            raise self._broke(error) from None
        finally:
            self._waiting = False
        self._silent_ticks = 0
        return data

    async def send_bytes(self, data: bytes | memoryview, still_s: float = STILL_S) -> None:
        """Raw bytes after a message that announced them, a slice at a time: no more of them wait here than the peer may
        be behind. ConnectionLost when it takes none for `still_s` seconds. Not with `keep_alive`."""
        view = memoryview(data)
        for start in range(0, len(view), _SLICE_BYTES):
            if self.is_closed:
                raise self._failure or ConnectionLost("connection is closed")
            self._writer.write(view[start : start + _SLICE_BYTES])
            await self._drain(still_s)

    async def receive_bytes(self, num_bytes: int, still_s: float = STILL_S) -> bytes:
        """Exactly `num_bytes` raw bytes. ConnectionLost when none come for `still_s` seconds. Not with `keep_alive`."""
        pieces, missing = list[bytes](), num_bytes
        while missing:
            here = f"{num_bytes - missing} of {num_bytes} bytes"
            try:
                async with asyncio.timeout(still_s):
                    piece = await self._wait_for(self._reader.read(min(_SLICE_BYTES, missing)))
            except TimeoutError:
                raise self._fail(ConnectionLost(f"{here}, and no more within {still_s:g} s")) from None
            if not piece:
                raise self._fail(ConnectionLost(f"peer closed the connection after {here}"))
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    async def _drain(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self._writer.drain()
        except TimeoutError:
            raise self._fail(ConnectionLost(f"peer did not read for {timeout:g} s")) from None
        except OSError as error:
            raise self._broke(error) from None

    def _broke(self, error: OSError) -> TransferError:
        lost = ConnectionLost(f"connection broke: {type(error).__name__}")
        return self._fail(error.error if isinstance(error, CertificateRefused) else lost)

    def _fail(self, failure: TransferError) -> TransferError:
        """Remember the first failure and drop the connection at once; whoever waits on it wakes."""
        if self._failure is None:
            self._failure = failure
            self._stop()
            self._writer.transport.abort()
        return self._failure

    def _stop(self) -> None:
        if self._watch is not None and self._watch is not asyncio.current_task():
            self._watch.cancel()

    def abort(self) -> None:
        """Drop the connection at once, without sending what is queued."""
        self._fail(ConnectionLost("dropped on purpose"))

    async def close(self, timeout: float = 1.0) -> None:
        """Send what is queued, then close. Safe to call twice."""
        self._stop()
        try:
            async with asyncio.timeout(timeout):
                self._writer.close()
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            self._writer.transport.abort()


async def connect(
    address: Address,
    *,
    deadline_s: float,
    messages: Any,
    max_frame: int,
    silence_s: float = SILENCE_S,
    tls: Tls | None = None,
) -> Connection:
    """Connect, trying again until `deadline_s` seconds have passed. Raises ConnectionLost then, and HandshakeError at
    once where one side does not take the other's certificate."""
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    pause = 0.05
    while True:
        try:
            async with asyncio.timeout_at(min(end, loop.time() + ATTEMPT_S)):
                reader, writer = await open_streams(address, tls)
            return Connection(reader, writer, messages=messages, max_frame=max_frame, silence_s=silence_s)
        except OSError as error:  # TimeoutError is one of these
            if loop.time() + pause >= end:
                reason = type(error).__name__
                raise ConnectionLost(f"no connection to {address_text(address)}: {reason}") from None
        await asyncio.sleep(pause)
        pause = min(2 * pause, 1.0)


connect_hub = partial(connect, messages=HubMessage, max_frame=MAX_HUB_FRAME)
"""A rank's connection with the frontend process."""
connect_link = partial(connect, messages=LinkMessage, max_frame=MAX_LINK_FRAME)
"""The control connection of an encode rank with a language rank."""


class Dial(Protocol):
    """How one comes to a link's connection: `connect_link`, or within a process."""

    async def __call__(self, address: Address, *, deadline_s: float) -> Connection: ...


async def link_pair() -> tuple[Connection, Connection]:
    """Both ends of a link's connection within a process; nobody listens."""
    make = partial(Connection, messages=LinkMessage, max_frame=MAX_LINK_FRAME)
    near, far = socket.socketpair()
    return make(*await asyncio.open_connection(sock=near)), make(*await asyncio.open_connection(sock=far))

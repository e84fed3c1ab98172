"""A listener of control connections: of a peer that has not shown the job's token, nothing but its first frame is read,
and before that, with TLS, its handshake.

Both come straight from the socket, a few KiB at most; more stays with the kernel. Buffers, other messages and larger
frames are for those that have shown the token.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.protocol.messages import Refused
from qwen3vl_disagg.transport.control import FRAME_HEADER_BYTES, Connection, encode_frame
from qwen3vl_disagg.transport.listener import Listener
from qwen3vl_disagg.transport.opening import PIECE_BYTES, Opening, PlainOpening, TlsOpening
from qwen3vl_disagg.transport.refusals import Refusals
from qwen3vl_disagg.transport.tls import FIELD, Tls, words_of

MAX_HELLO_FRAME = 8 * 1024
"""A rank's hello with its fingerprint is 1 to 3 KiB."""
HELLO_S = 5.0
"""From when a peer is there until its hello is, a handshake included."""
MAX_STRANGERS = 128
"""Peers that have not shown the token yet. A further one takes the place of the one that has been here longest: who
belongs here says hello at once."""
_TLS_RECORD = b"\x16"
"""The first byte of a TLS connection. That of a frame is 0: none is as long."""

Admit = Callable[[Any, Opening], Awaitable[None]]
"""(first message, the way back), which is then the callee's."""
Serve = Callable[[Any, Connection], Awaitable[None]]
"""(first message, the connection behind it); the connection is closed when it returns."""


class Door(Listener):
    """Calls `admit` in a task for each peer that shows the token in its first message, until `close`.

    With `tls` a peer shows a certificate first. Who comes with TLS where there is none, or without, is told.
    """

    def __init__(
        self, sock: socket.socket, admit: Admit, *, token: str, messages: Any, name: str, tls: Tls | None = None
    ) -> None:
        if not token:
            raise ValueError("an empty token would let anybody in")
        self._admit, self._token, self._tls = admit, token.encode(), tls
        self._decoder = msgspec.msgpack.Decoder(messages)
        self._strangers: OrderedDict[asyncio.Task[Any], None] = OrderedDict()
        self._refusals = Refusals()
        super().__init__(sock, asyncio.Protocol, name=name)

    @property
    def num_strangers(self) -> int:
        return len(self._strangers)

    def close(self) -> None:
        super().close()
        for stranger in self._strangers:
            stranger.cancel()

    async def _begin(self, sock: socket.socket) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a peer is met in a task of its own")
        self._strangers[task] = None
        if len(self._strangers) > MAX_STRANGERS:
            longest, _ = self._strangers.popitem(last=False)
            longest.cancel()
        came = None
        try:
            async with asyncio.timeout(HELLO_S):
                came = await self._meet(sock)
        except ssl.SSLError as error:  # behind the handshake
            self._say(sock, words_of(error))
        except (OSError, ValueError, RecursionError):
            pass  # it is gone, too slow, or says no hello
        finally:
            self._strangers.pop(task, None)
            if came is None:
                sock.close()
        if came is not None:
            await self._admit(*came)

    async def _meet(self, sock: socket.socket) -> tuple[Any, Opening] | None:
        """The first message, if the token is in it, and what is behind it. None for who was told that it is refused;
        ValueError for what is no hello."""
        if self._tls is None:
            opening: Opening = PlainOpening(sock)
        else:
            first = await self._loop.sock_recv(sock, PIECE_BYTES)
            if first[:1] != _TLS_RECORD:
                if first:
                    await self._send_off(sock, "TLS", "speaks no TLS")
                return None
            secured = await self._shake(sock, self._tls, first)
            if isinstance(secured, str):
                await self._send_off(sock, None, secured)
                return None
            opening = secured
        start = await self._read(opening, FRAME_HEADER_BYTES)
        if self._tls is None and start[:1] == _TLS_RECORD:
            await self._send_off(sock, "no TLS", "speaks TLS")
            return None
        hello = await self._hello(opening, int.from_bytes(start, "big"))
        return None if hello is None else (hello, opening)

    async def _shake(self, sock: socket.socket, tls: Tls, first: bytes) -> TlsOpening | str:
        """Or what is wrong with the peer, which it has been told."""
        opening = TlsOpening(sock, tls, is_server=True)
        try:
            await opening.shake(first)
        except ssl.SSLError as error:
            return words_of(error)
        except BaseException:
            opening.close()
            raise
        return opening

    async def _hello(self, opening: Opening, length: int) -> Any:
        if not 0 < length <= MAX_HELLO_FRAME:
            raise ValueError(f"a first frame of {length} bytes")
        first = self._decoder.decode(await self._read(opening, length))
        token = getattr(first, "token", "")
        if hmac.compare_digest(token.encode(), self._token):
            return first
        refused = Refused(field="token", expected="the job's token", got="another")
        await opening.send(encode_frame(refused, MAX_HELLO_FRAME))
        return None

    async def _send_off(self, sock: socket.socket, expected: str | None, problem: str) -> None:
        """Say why, here and, if `expected` is given, to the peer. What it still sends is read before the end: else its
        kernel would drop what it was told."""
        self._say(sock, problem)
        if expected is not None:
            refused = Refused(field=FIELD, expected=expected, got=f"a peer that {problem}")
            await self._loop.sock_sendall(sock, encode_frame(refused, MAX_HELLO_FRAME))
        sock.shutdown(socket.SHUT_WR)
        for _ in range(MAX_HELLO_FRAME // PIECE_BYTES):
            if not await self._loop.sock_recv(sock, PIECE_BYTES):
                return

    def _say(self, sock: socket.socket, problem: str) -> None:
        try:
            host = str(sock.getpeername()[0])
        except OSError:
            host = "an address that is gone"
        self._refusals.say(host, f"{self._name}: refused a peer at {host}: it {problem}")

    async def _read(self, opening: Opening, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            piece = await opening.receive(num_bytes - len(data))
            if not piece:
                raise ConnectionError("the peer closed the connection")
            data += piece
        return data


class Doorkeeper(Door):
    """Calls `serve` with a connection for each peer that shows the token."""

    def __init__(
        self,
        sock: socket.socket,
        serve: Serve,
        *,
        token: str,
        messages: Any,
        max_frame: int,
        name: str,
        tls: Tls | None = None,
    ) -> None:
        self._serve, self._messages, self._max_frame = serve, messages, max_frame
        super().__init__(sock, self._greet, token=token, messages=messages, name=name, tls=tls)

    async def _greet(self, first: Any, opening: Opening) -> None:
        connection = Connection(*await opening.streams(), messages=self._messages, max_frame=self._max_frame)
        try:
            await self._serve(first, connection)
        except (DisaggError, OSError):
            pass  # the peer is gone, or does not fit and was told; nobody else is touched
        finally:
            await connection.close()

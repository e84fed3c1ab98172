"""A listener of control connections: of a peer that has not shown the job's token, nothing but its first frame is read.

The first frame comes straight from the socket, a few KiB at most; more stays with the kernel. Buffers, other messages
and larger frames are for those that have shown the token.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.protocol.messages import Refused
from qwen3vl_disagg.transport.control import FRAME_HEADER_BYTES, Connection, encode_frame
from qwen3vl_disagg.transport.listener import Listener

MAX_HELLO_FRAME = 8 * 1024
"""A rank's hello with its fingerprint is 1 to 3 KiB."""
HELLO_S = 5.0
MAX_STRANGERS = 128
"""Peers that have not shown the token yet. A further one takes the place of the one that has been here longest: who
belongs here says hello at once."""

Serve = Callable[[Any, Connection], Awaitable[None]]
"""(first message, the connection behind it); the connection is closed when it returns."""


class Doorkeeper(Listener):
    """Calls `serve` in a task for each peer that shows the token in its first message, until `close`."""

    def __init__(
        self, sock: socket.socket, serve: Serve, *, token: str, messages: Any, max_frame: int, name: str
    ) -> None:
        if not token:
            raise ValueError("an empty token would let anybody in")
        self._serve, self._token, self._messages, self._max_frame = serve, token.encode(), messages, max_frame
        self._decoder = msgspec.msgpack.Decoder(messages)
        self._strangers: OrderedDict[asyncio.Task[Any], None] = OrderedDict()
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
        first = None
        try:
            async with asyncio.timeout(HELLO_S):
                first = await self._hello(sock)
        except (OSError, ValueError, RecursionError):
            pass  # it is gone, too slow, or says no hello
        finally:
            self._strangers.pop(task, None)
            if first is None:
                sock.close()
        if first is None:
            return
        reader, writer = await asyncio.open_connection(sock=sock)
        connection = Connection(reader, writer, messages=self._messages, max_frame=self._max_frame)
        try:
            await self._serve(first, connection)
        except (DisaggError, OSError):
            pass  # the peer is gone, or does not fit and was told; nobody else is touched
        finally:
            await connection.close()

    async def _hello(self, sock: socket.socket) -> Any:
        """The first message, if the token is in it. ValueError if it is none, None if it shows another token."""
        length = int.from_bytes(await self._read(sock, FRAME_HEADER_BYTES), "big")
        if not 0 < length <= MAX_HELLO_FRAME:
            raise ValueError(f"a first frame of {length} bytes")
        first = self._decoder.decode(await self._read(sock, length))
        token = getattr(first, "token", "")
        if hmac.compare_digest(token.encode(), self._token):
            return first
        refused = Refused(field="token", expected="the job's token", got="another")
        await self._loop.sock_sendall(sock, encode_frame(refused, MAX_HELLO_FRAME))
        return None

    async def _read(self, sock: socket.socket, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            piece = await self._loop.sock_recv(sock, num_bytes - len(data))
            if not piece:
                raise ConnectionError("the peer closed the connection")
            data += piece
        return data

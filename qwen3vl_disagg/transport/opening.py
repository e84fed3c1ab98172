"""A connection's first bytes, before it is one of streams: few enough that a stranger costs little, of no event loop
until `streams`, with TLS or without.

asyncio's own TLS reads 256 KiB ahead of a peer that has shown nothing yet, and its connections belong to one loop.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Protocol

from qwen3vl_disagg.transport.sockets import Address, address_text, family_of
from qwen3vl_disagg.transport.tls import Tls, failure
from qwen3vl_disagg.transport.tls_streams import TlsEnd, tls_streams

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PIECE_BYTES = 4096
MAX_HANDSHAKE_BYTES = 16 * 1024
"""What a peer sends before its handshake has ended: a hello of 2 KiB at most, and its certificate with those between it
and the CA, 1 to 2 KiB each."""


class Opening(Protocol):
    """Either `receive` and `send`, or from then on `streams`."""

    async def receive(self, num_bytes: int) -> bytes:
        """Up to so many, b"" at the end. OSError (ssl.SSLError is one) when the connection breaks."""

    async def send(self, data: bytes) -> None: ...

    def send_now(self, data: bytes) -> None:
        """On a socket that still blocks."""

    async def streams(self) -> Streams:
        """On the running loop."""

    def close(self) -> None: ...


class PlainOpening:
    """Takes over a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def receive(self, num_bytes: int) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self._sock, num_bytes)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    def send_now(self, data: bytes) -> None:
        self._sock.sendall(data)

    async def streams(self) -> Streams:
        return await asyncio.open_connection(sock=self._sock)

    def close(self) -> None:
        self._sock.close()


class TlsOpening:
    """Takes over a socket. First `shake`, or on a socket that blocks `shake_now`.

    ssl.SSLError says what is wrong with the other side; it has been told then.
    """

    def __init__(self, sock: socket.socket, tls: Tls, *, is_server: bool) -> None:
        self._sock, self._end = sock, TlsEnd(tls.context(is_server=is_server), is_server=is_server)

    async def shake(self, first: bytes = b"") -> None:
        """`first`: what was received already. ValueError where the other side sends too much."""
        num_bytes = len(first)
        self._end.take(first)
        while not await self._advance():
            data = await asyncio.get_running_loop().sock_recv(self._sock, PIECE_BYTES)
            num_bytes += len(data)
            if not data:
                raise ConnectionError("the peer closed the connection")
            if num_bytes > MAX_HANDSHAKE_BYTES:
                raise ValueError(f"a handshake of more than {MAX_HANDSHAKE_BYTES} bytes")
            self._end.take(data)

    async def _advance(self) -> bool:
        try:
            return self._end.advance()
        finally:
            await self._flush()

    def shake_now(self) -> None:
        try:
            while not self._end.advance():
                self._sock.sendall(self._end.to_send())
                data = self._sock.recv(PIECE_BYTES)
                if not data:
                    raise ConnectionError("the peer closed the connection")
                self._end.take(data)
        finally:
            self._sock.sendall(self._end.to_send())

    async def receive(self, num_bytes: int) -> bytes:
        while (data := self._end.read(num_bytes)) is None:
            raw = await asyncio.get_running_loop().sock_recv(self._sock, PIECE_BYTES)
            if not raw:
                return b""
            self._end.take(raw)
        return data

    async def send(self, data: bytes) -> None:
        self._end.write(data)
        await self._flush()

    def send_now(self, data: bytes) -> None:
        self._end.write(data)
        self._sock.sendall(self._end.to_send())

    async def _flush(self) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, self._end.to_send())

    async def streams(self) -> Streams:
        return await tls_streams(self._sock, self._end)

    def close(self) -> None:
        """OpenSSL's 50 KiB go at once, also where a task that was cancelled is kept, with all that it had, until
        garbage is collected."""
        self._sock.close()
        del self._end


async def open_streams(address: Address, tls: Tls | None) -> Streams:
    """Connect. OSError if that does not work; HandshakeError where the other side is not one of the CA's."""
    if tls is None:
        return await asyncio.open_connection(*address)
    sock = socket.socket(family_of(address[0]), socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
        opening = TlsOpening(sock, tls, is_server=False)
        await opening.shake()
        return await opening.streams()
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        sock.close()
        raise ConnectionError("the peer closed the connection") from error
    except ssl.SSLError as error:
        sock.close()
        raise failure(address_text(address), error) from None
    except BaseException:
        sock.close()
        raise


def secure_now(sock: socket.socket, tls: Tls | None) -> Opening:
    """Takes over a connected socket that blocks. OSError or HandshakeError as `open_streams`."""
    if tls is None:
        return PlainOpening(sock)
    opening = TlsOpening(sock, tls, is_server=False)
    try:
        opening.shake_now()
    except ssl.SSLError as error:
        peer = address_text(sock.getpeername()[:2])
        sock.close()
        raise failure(peer, error) from None
    return opening

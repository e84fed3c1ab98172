"""TLS over a socket or over asyncio's streams; the handshake and the bytes are OpenSSL's, in memory."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.transport.sockets import address_text
from qwen3vl_disagg.transport.tls import failure

_READ_BYTES = 64 * 1024


class CertificateRefused(ConnectionError):
    """The other side has said that it does not take this one's certificate."""

    def __init__(self, error: HandshakeError) -> None:
        super().__init__(str(error))
        self.error = error


class TlsEnd:
    """One end: bytes of the wire in and out, bytes of ours out and in. Every method may raise ssl.SSLError, and what
    `to_send` gives then tells the other end."""

    def __init__(self, context: ssl.SSLContext, *, is_server: bool) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._in, self._out, server_side=is_server)

    def take(self, data: bytes) -> None:
        """From the wire."""
        self._in.write(data)

    def to_send(self) -> bytes:
        """To the wire."""
        return self._out.read()

    def advance(self) -> bool:
        """Whether the handshake has ended, on this side."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def read(self, num_bytes: int) -> bytes | None:
        """Up to so many; b"" at the end, None where more of the wire is needed."""
        try:
            return self._object.read(num_bytes)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLZeroReturnError:
            return b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """All of it, a record at a time."""
        view = memoryview(data).cast("B")
        while view:
            view = view[self._object.write(view) :]

    def finish(self) -> None:
        """Tell the other end that no more comes."""
        try:
            self._object.unwrap()
        except ssl.SSLError:  # what the other end says to that is not waited for
            return


async def tls_streams(sock: socket.socket, end: TlsEnd) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Over a socket that is connected, of an end whose handshake has ended."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    plain = asyncio.StreamReaderProtocol(reader, loop=loop)
    _, shell = await loop.connect_accepted_socket(lambda: _Shell(end, plain), sock)
    return reader, asyncio.StreamWriter(shell.inner, plain, reader, loop)


class _Shell(asyncio.Protocol):
    """Between the socket's transport and the protocol of the streams."""

    inner: _Inner

    def __init__(self, end: TlsEnd, plain: asyncio.StreamReaderProtocol) -> None:
        self._end, self._plain = end, plain
        self._failure: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"{type(transport).__name__} is no transport of a stream")
        self.inner = _Inner(transport, self._end)
        self._plain.connection_made(self.inner)
        self._read()  # what came behind the handshake

    def data_received(self, data: bytes) -> None:
        self._end.take(data)
        self._read()

    def _read(self) -> None:
        try:
            while data := self._end.read(_READ_BYTES):
                self._plain.data_received(data)
        except ssl.SSLError as error:
            self._fail(error)
        else:
            self.inner.flush()
            if data is not None:
                self._plain.eof_received()

    def _fail(self, error: ssl.SSLError) -> None:
        peer = tuple(self.inner.get_extra_info("peername") or ("?", 0))[:2]
        told = failure(address_text(peer), error)
        self._failure = CertificateRefused(told) if isinstance(told, HandshakeError) else told
        self.inner.flush()
        self.inner.abort()

    def eof_received(self) -> bool | None:
        """Also without a word of TLS: messages have their lengths."""
        return self._plain.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        self._plain.connection_lost(self._failure or error)

    def pause_writing(self) -> None:
        self._plain.pause_writing()

    def resume_writing(self) -> None:
        self._plain.resume_writing()


class _Inner(asyncio.Transport):
    """What the streams take for their transport. What is written is encrypted at once; the rest is the socket's."""

    def __init__(self, raw: asyncio.Transport, end: TlsEnd) -> None:
        super().__init__()
        self._raw, self._end = raw, end

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._raw.is_closing():
            self._end.write(data)
            self.flush()

    def flush(self) -> None:
        if data := self._end.to_send():
            self._raw.write(data)

    def close(self) -> None:
        if not self._raw.is_closing():
            self._end.finish()
            self.flush()
            self._raw.close()

    def abort(self) -> None:
        self._raw.abort()

    def is_closing(self) -> bool:
        return self._raw.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._raw.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size()

    def pause_reading(self) -> None:
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        self._raw.resume_reading()

    def can_write_eof(self) -> bool:
        return False

"""What a hostile client sends on many connections at once, as bytes of each."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Iterable

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = (HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode()


def one_byte_chunks(num_body_bytes: int) -> bytes:
    return CHUNKED + b"1\r\nx\r\n" * num_body_bytes


def small_chunks(num_body_bytes: int, size: int) -> bytes:
    return CHUNKED + (f"{size:x}\r\n".encode() + b"x" * size + b"\r\n") * (num_body_bytes // size)


def chunk_extensions(count: int) -> bytes:
    return CHUNKED + (b"1;" + b"e" * 8000 + b"\r\nx\r\n") * count


def trailers(num_bytes: int) -> bytes:
    return CHUNKED + b"1\r\nx\r\n0\r\n" + b"a:b\r\n" * (num_bytes // 5) + b"\r\n"


def pipelined(count: int, path: str = "/health") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * count


def many_headers(count: int) -> bytes:
    return b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a:b\r\n" * count + b"\r\n"


def unread_bodies(num_body_bytes: int) -> bytes:
    """A path that does not exist: answered before its body has come."""
    head = f"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: {num_body_bytes}\r\n\r\n".encode()
    return head + b"x" * num_body_bytes


def unread_chunks(num_body_bytes: int) -> bytes:
    return one_byte_chunks(num_body_bytes).replace(b"/v1/chat/completions", b"/nothing", 1)


def send_all(port: int, payloads: Iterable[bytes], *, hold_s: float, step: int = 1 << 20, reads: bool = True) -> None:
    """Send each payload on a connection of its own, all at once, `step` bytes at a time.

    The connections are held for `hold_s`, or until the server has closed them all. Answers are read and dropped,
    unless `reads` is false.
    """
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        left = {}
        for payload in payloads:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5.0))
            sock.setblocking(False)
            left[sock] = memoryview(payload)
            selector.register(sock, selectors.EVENT_WRITE | (selectors.EVENT_READ if reads else 0))
        end = time.monotonic() + hold_s
        while left and time.monotonic() < end:
            for key, events in selector.select(0.1):
                sock = key.fileobj
                try:
                    if events & selectors.EVENT_READ and not sock.recv(1 << 16):
                        raise ConnectionResetError
                    if events & selectors.EVENT_WRITE:
                        left[sock] = left[sock][sock.send(left[sock][:step]) :]
                        if not left[sock]:
                            selector.modify(sock, selectors.EVENT_READ)
                except BlockingIOError:
                    continue
                except OSError:
                    selector.unregister(sock)
                    del left[sock]

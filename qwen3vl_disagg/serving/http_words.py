"""What is to be said on a connection if this process dies: a whole 503 before an answer begins, then the last event of
a stream, and nothing between. Who says it: `cluster/last_words.py`."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from starlette.types import Message

from qwen3vl_disagg.cluster.last_words import Held, LastWords
from qwen3vl_disagg.serving.errors import error_response, interrupted, is_messages_path

WORDS, EVENT = "words", "last_words"
"""In a request's `state`: its connection's `HttpWords`. In the message that begins a stream: what would end it."""


class HttpWords:
    """Of one connection. Without a keeper nothing is done."""

    def __init__(self, words: LastWords, transport: asyncio.Transport) -> None:
        self._transport = transport
        sock = transport.get_extra_info("socket")
        self._held: Held | None = None if sock is None else words.hold(sock)

    def request(self, path: str) -> None:
        """A request has begun, and no answer to it."""
        if self._held is not None:
            self._held.prepare(_refusal(is_messages=is_messages_path(path)))
            self._held.mark()

    def answer(self, message: Message, http_version: str) -> None:
        """Before a message of the answer is written: what there is to say behind it. Takes out what only we know."""
        if message["type"] == "http.response.start":
            self._prepare(_chunk(message.pop(EVENT, b""), http_version))
        elif not message.get("more_body", False):
            self._prepare(b"")

    def _prepare(self, words: bytes) -> None:
        if self._held is not None:
            self._held.prepare(words)

    def write(self, data: Any) -> None:
        """To the transport."""
        if self._held is not None:
            self._held.will_write(len(data))
        self._transport.write(data)

    def release(self) -> None:
        """The connection is over. The keeper's end would hold it open."""
        if self._held is not None:
            self._held.release()
            self._held = None


def _chunk(event: bytes, http_version: str) -> bytes:
    """As the last one of a body without a known length."""
    if not event or http_version != "1.1":
        return event
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)


@cache
def _refusal(*, is_messages: bool) -> bytes:
    """A whole response."""
    response = error_response(interrupted(), "/v1/messages" if is_messages else "")
    headers = [*response.raw_headers, (b"connection", b"close")]
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    return b"HTTP/1.1 503 Service Unavailable\r\n" + lines + b"\r\n" + bytes(response.body)

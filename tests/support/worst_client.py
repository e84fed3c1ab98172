"""A hostile client: `python -m tests.support.worst_client PORT NAME SECONDS`, again and again on many connections."""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Callable

from tests.support import http_attacks as attacks
from tests.support.images import png

Payloads = Callable[[], list[bytes]]


def _post(body: bytes) -> bytes:
    return f"{attacks.HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _chat(content: object, **fields: object) -> bytes:
    return _post(json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode())


def _raw(value: str) -> bytes:
    """A chat request with a field whose value stands as it is."""
    head = '{"messages": [{"role": "user", "content": "hi"}], "user": '
    return _post((head + value + "}").encode())


def _image(data: str) -> bytes:
    return _chat([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}])


def _pictures() -> bytes:
    url = "data:image/png;base64," + base64.b64encode(png() + b"\0" * 1_000_000).decode()
    return _chat([{"type": "image_url", "image_url": {"url": url}}] * 16)


WORST: dict[str, Payloads] = {
    "13 MB of text": lambda: [_chat("a b" * 4_300_000)] * 40,
    "13 MB of one letter": lambda: [_chat("a" * 13_000_000)] * 4,
    "13 MB in many turns": lambda: (
        [_post(json.dumps({"messages": [{"role": "user", "content": "word " * 50}] * 45_000}).encode())] * 4
    ),
    "60 connections of chunks of one byte": lambda: [attacks.one_byte_chunks(250_000)] * 60,
    "60 connections of chunks for a path that is none": lambda: [attacks.unread_chunks(250_000)] * 60,
    "numbers of 4,000 digits": lambda: [_raw("[" + ",".join(["9" * 4000] * 4000) + "]")] * 4,
    "numbers of 4,000 digits and a point": lambda: [_raw("[" + ",".join(["9" * 4000 + ".5e9"] * 4000) + "]")] * 4,
    "deep JSON": lambda: [_raw("[" * 5_000_000)] * 4,
    "wide JSON": lambda: [_raw("[" + "{}," * 200_000 + "1]")] * 8,
    "long strings with escapes": lambda: [_raw('"' + "\\u00e9" * 3_000_000 + '"')] * 4,
    "many keys": lambda: [_raw("{" + ",".join(f'"{n}":{n}' for n in range(200_000)) + "}")] * 8,
    "40 MB of base64": lambda: [_image("A" * 40_000_000)] * 3,
    "base64 in lines": lambda: [_image("\\n".join(["A" * 76] * 300_000).replace("\\n", "\n"))] * 3,
    "16 pictures of 1 MB each": lambda: [_pictures()] * 3,
    "bodies that nobody reads": lambda: [attacks.unread_bodies(20_000_000)] * 40,
    "many small headers": lambda: [attacks.many_headers(3_000)] * 200,
    "trailers": lambda: [attacks.trailers(200_000)] * 100,
    "pipelined requests": lambda: [attacks.pipelined(2_000, "/v1/models")] * 60,
    "headers that do not come": lambda: [b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "] * 900,
    "bodies that do not come": lambda: [attacks.HEAD.encode() + b"Content-Length: 1000\r\n\r\n{"] * 900,
}
SILENT = {"streams that nobody reads": lambda: [_chat("tell me", stream=True, max_tokens=400, ignore_eos=True)] * 20}


def attack(port: int, name: str, seconds: float) -> None:
    """Until the time is over. Connections are held for 3 s, or for the whole time where waiting is the attack."""
    payloads = (WORST | SILENT)[name]()
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        hold_s = left if name in SILENT or "do not come" in name else min(left, 3.0)
        attacks.send_all(port, payloads, hold_s=hold_s, reads=name not in SILENT)


if __name__ == "__main__":
    attack(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))

"""HTTP for tests over a real socket: one deadline for a whole exchange, and a reader of event streams."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    """Names in lower case."""
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)


def request(
    url: str,
    method: str = "GET",
    data: bytes | None = None,
    *,
    headers: dict[str, str] | None = None,
    deadline_s: float = 60.0,
) -> Reply:
    """One exchange on a connection of its own. TimeoutError if it is not over after `deadline_s`."""
    connection, response, deadline = _open(url, method, data, headers, deadline_s)
    try:
        chunks = []
        while chunk := _read(connection, response, deadline):
            chunks.append(chunk)
        names = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, names, b"".join(chunks))
    finally:
        connection.close()


def post_json(url: str, body: Any, *, headers: dict[str, str] | None = None, deadline_s: float = 60.0) -> Reply:
    """POST a value, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request(
        url, "POST", data, headers={"Content-Type": "application/json", **(headers or {})}, deadline_s=deadline_s
    )


def sse_lines(url: str, body: Any, *, deadline_s: float = 60.0) -> Iterator[str]:
    """The lines of a streamed answer as they come, without line ends. AssertionError unless it is an event stream.

    Closing the iterator closes the connection.
    """
    headers = {"Content-Type": "application/json"}
    connection, response, deadline = _open(url, "POST", json.dumps(body).encode(), headers, deadline_s)
    try:
        kind = response.getheader("content-type", "")
        if response.status != 200 or not kind.startswith("text/event-stream"):
            raise AssertionError(f"no event stream: {response.status} {kind} {response.read(2000)!r}")
        rest = b""
        while chunk := _read(connection, response, deadline):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line.decode()
    finally:
        connection.close()


def sse_events(url: str, body: Any, *, deadline_s: float = 60.0) -> list[Any]:
    """All events of a streamed answer, parsed; the last one is the string "[DONE]" if the stream ended well."""
    data = [line[6:] for line in sse_lines(url, body, deadline_s=deadline_s) if line.startswith("data: ")]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in data]


def _open(
    url: str, method: str, data: bytes | None, headers: dict[str, str] | None, deadline_s: float
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse, float]:
    deadline = time.monotonic() + deadline_s
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=deadline_s)
    try:
        connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), data, headers or {})
        return connection, connection.getresponse(), deadline
    except BaseException:
        connection.close()
        raise


def _read(connection: http.client.HTTPConnection, response: http.client.HTTPResponse, deadline: float) -> bytes:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the answer is not complete at the deadline")
    if connection.sock is not None:  # None when the server closes after this answer; the timeout set before stays
        connection.sock.settimeout(left)
    return response.read1(65536)

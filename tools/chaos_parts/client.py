"""One request over HTTP, with a bound on every wait, and all that can be seen of its end. Standard library only."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tools.chaos_parts.verdicts import Reply

PATH = "/v1/chat/completions"
ERROR_FIELDS = {"message", "type", "param", "code"}
CONNECT_S = 10.0
SLOW_PIECES, SMALL_BUFFER = 8, 2048
"""A slow client sends its body in so many pieces, and has room for so many bytes of what comes back."""
MOST_SILENCES = 2
"""A stream that comes by drops may take so many times what a silence may."""


@dataclass(frozen=True)
class Patience:
    """`silence_s`: without a byte, that long is for ever. `leave_after_s`: the client hangs up then. `pause_s`: it
    sleeps so long after each event of a stream."""

    silence_s: float
    leave_after_s: float | None = None
    pause_s: float = 0.0


def exchange(port: int, body: bytes, headers: Mapping[str, str], patience: Patience) -> Reply:
    """What comes back; nothing is raised for what the server, or its death, does."""
    reply = Reply()
    started = time.monotonic()
    ends = started + (patience.leave_after_s or patience.silence_s)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=max(0.05, min(CONNECT_S, ends - started)))
    try:
        connection.connect()
        connection.sock.settimeout(max(0.05, ends - time.monotonic()))
        if patience.pause_s:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        sent = _slowly(body, patience.pause_s) if patience.pause_s else body
        connection.request("POST", PATH, sent, {**headers, "Content-Length": str(len(body))})
        response = connection.getresponse()
        reply.status = response.status
        reply.retry_after = response.getheader("Retry-After")
        kind = response.getheader("Content-Type") or ""
        if kind.startswith("text/event-stream"):
            _read_stream(response, connection, reply, patience, started)
        else:
            _read_body(response.read(), kind, reply)
    except TimeoutError:
        reply.ending = "silent" if patience.leave_after_s is None else "left"
        reply.note = f"nothing for {time.monotonic() - started:.0f} s, status {reply.status}"
    except (OSError, http.client.HTTPException) as error:
        reply.ending, reply.note = "cut", f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    return reply


def _slowly(body: bytes, pause_s: float) -> Iterator[bytes]:
    step = max(1, len(body) // SLOW_PIECES)
    for start in range(0, len(body), step):
        time.sleep(pause_s)
        yield body[start : start + step]


def _read_body(data: bytes, kind: str, reply: Reply) -> None:
    reply.ending = "whole"
    try:
        value = json.loads(data)
        if reply.status == 200:
            reply.texts = [choice["message"]["content"] for choice in value["choices"]]
        else:
            reply.error = value["error"]
            reply.is_typed = kind.startswith("application/json") and _is_typed(reply.error)
    except (ValueError, KeyError, TypeError) as error:
        reply.note = f"not what a body is: {error!r}: {data[:200]!r}"


def _is_typed(error: object) -> bool:
    return isinstance(error, dict) and set(error) == ERROR_FIELDS


def _read_stream(
    response: http.client.HTTPResponse,
    connection: http.client.HTTPConnection,
    reply: Reply,
    patience: Patience,
    started: float,
) -> None:
    """To [DONE], an error event, or the end of the connection."""
    texts: dict[int, str] = {}
    finished: set[int] = set()
    leaves = None if patience.leave_after_s is None else started + patience.leave_after_s
    hangs = started + MOST_SILENCES * patience.silence_s
    for line in response:
        now = time.monotonic()
        if now > hangs:
            raise TimeoutError
        if leaves is not None and connection.sock is not None:
            if now >= leaves:
                raise TimeoutError
            connection.sock.settimeout(leaves - now)
        if not line.startswith(b"data: "):
            continue
        data = line[len(b"data: ") :].strip()
        if data == b"[DONE]":
            _conclude(reply, texts, finished)
            return
        if not _take(data, reply, texts, finished):
            return
        if reply.seconds_to_first is None and any(texts.values()):
            reply.seconds_to_first = now - started
        time.sleep(patience.pause_s)
    reply.note = "a stream without an end"


def _take(data: bytes, reply: Reply, texts: dict[int, str], finished: set[int]) -> bool:
    """Whether the stream goes on behind this event."""
    try:
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            reply.ending, reply.error, reply.is_typed = "whole", event["error"], _is_typed(event["error"])
            return False
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + (choice["delta"].get("content") or "")
            if choice["finish_reason"] is not None:
                finished.add(choice["index"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reply.ending, reply.note = "whole", f"not what an event is: {error!r}: {data[:200]!r}"
        return False
    return True


def _conclude(reply: Reply, texts: dict[int, str], finished: set[int]) -> None:
    reply.ending = "whole"
    if set(texts) == finished:
        reply.texts = [texts[number] for number in sorted(texts)]
    else:
        reply.note = f"[DONE] with answers {sorted(finished)} of {sorted(texts)} finished"

"""Load for a benchmark: requests, when they arrive, and when their tokens come back."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

TIMEOUT_MS = 1_800_000
WORDS = ("ba", "de", "fi", "go", "hu", "ka", "le", "mi", "no", "pu")


@dataclass
class Stream:
    """One streamed request, times in `time.perf_counter` seconds."""

    sent: float
    stamps: list[float] = field(default_factory=list)
    finished: float = 0.0
    timings: dict[str, Any] = field(default_factory=dict)

    @property
    def first_token_s(self) -> float:
        return self.stamps[0] - self.sent


class LoadError(Exception):
    """The server did not answer a request as it should. `status`: of its answer, if there was one; `retry_after_s`:
    when it says to ask again."""

    def __init__(self, message: str, status: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times from 0 on at which requests arrive: independent of one another (Poisson), the same for a seed."""
    if rate <= 0:
        raise ValueError(f"{rate} requests/s")
    source, times, now = random.Random(seed), list[float](), 0.0
    while (now := now + source.expovariate(rate)) < seconds:
        times.append(now)
    return times


def text(num_words: int, seed: int) -> str:
    """Made-up words, no two alike in a row for long."""
    source = random.Random(seed)
    return " ".join("".join(source.choices(WORDS, k=2)) for _ in range(num_words))


def picture(side: int, seed: int) -> str:
    """A data URI of a square picture; every seed another one, with smooth colours, so that it is small."""
    pixels = random.Random(seed).randbytes(12 * 12 * 3)
    image = Image.frombytes("RGB", (12, 12), pixels).resize((side, side), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def body(
    text: str, images: Sequence[str], max_tokens: int, *, stream: bool = True, before: str = "", model: str = ""
) -> bytes:
    """A greedy chat request that does not end before `max_tokens`; the images stand between `before` and `text`."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": before}] if before else []
    parts += [{"type": "image_url", "image_url": {"url": url}} for url in images]
    request = {
        **({"model": model} if model else {}),
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": stream,
    }
    return json.dumps(request).encode()


async def send(port: int, request: bytes, record: Stream) -> None:
    """Stream one request into `record`. Cancelling closes the connection, and with it the request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Connection: close\r\nX-Request-Timeout-Ms: {TIMEOUT_MS}\r\nContent-Length: {len(request)}\r\n\r\n"
        writer.write(head.encode() + request)
        await writer.drain()
        status = await reader.readline()
        if b" 200 " not in status:
            raise refusal(status.decode().strip(), (await reader.read(4000)).decode(errors="replace"))
        while not record.finished:
            line = await reader.readline()
            if not line:
                raise LoadError("the stream broke off")
            if line.startswith(b"data: "):
                take(line[len(b"data: ") :].strip(), record)
    finally:
        writer.close()


def refusal(line: str, rest: str) -> LoadError:
    """`line`: an answer's first one; `rest`: headers and body."""
    words, again = line.split(), re.search(r"(?im)^retry-after: *(\d+)", rest)
    status = words[1] if len(words) > 1 else ""
    return LoadError(f"{line}: {rest[-600:]}", status, None if again is None else float(again[1]))


def take(data: bytes, record: Stream) -> None:
    """One event of a stream."""
    now = time.perf_counter()
    if data == b"[DONE]":
        record.finished = now
        return
    event = json.loads(data)
    if "error" in event:
        raise LoadError(event["error"]["message"])
    for choice in event["choices"]:
        # Servers that know no token ids send a token, or several, with each piece of text.
        num_tokens = len(choice["token_ids"] or ()) if "token_ids" in choice else bool(choice["delta"].get("content"))
        record.stamps += [now] * num_tokens
    record.timings = event.get("timings", record.timings)

"""Drive an ASGI app by hand: what the client sends, what it gets, and when it leaves."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message


def is_on_a_loop() -> bool:
    """Whether the caller runs on the thread of an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Exchange:
    """One request without a server. `leave` closes the connection; `sent` holds what the app answered so far."""

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        chunks: list[bytes],
        headers: dict[str, str] | None = None,
        *,
        method: str = "POST",
    ) -> None:
        self._app, self._inbox = app, asyncio.Queue[Message]()
        for i, chunk in enumerate(chunks):
            more = i + 1 < len(chunks)
            self._inbox.put_nowait({"type": "http.request", "body": chunk, "more_body": more})
        self.sent: list[Message] = []
        self.changed = asyncio.Condition()
        names = {"content-type": "application/json", **(headers or {})}
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in names.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": {},
        }
        self.num_received = 0

    async def run(self) -> None:
        """Until the app returns."""
        await self._app(self._scope, self._receive, self._send)

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def until(self, text: bytes, timeout_s: float = 5.0) -> None:
        """Until the body so far contains `text`."""
        async with asyncio.timeout(timeout_s), self.changed:
            await self.changed.wait_for(lambda: text in self.body)

    @property
    def status(self) -> int | None:
        return next((m["status"] for m in self.sent if m["type"] == "http.response.start"), None)

    @property
    def headers(self) -> dict[str, str]:
        start = next(m for m in self.sent if m["type"] == "http.response.start")
        return {name.decode(): value.decode() for name, value in start["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent if m["type"] == "http.response.body")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def _receive(self) -> Message:
        message = await self._inbox.get()
        self.num_received += len(message.get("body", b""))
        return message

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        async with self.changed:
            self.changed.notify_all()

"""How many connections there may be, and who still gets in when all places are taken."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3vl_disagg.core.errors import UnavailableError
from qwen3vl_disagg.core.host import descriptor_limit
from qwen3vl_disagg.serving.errors import error_response

ALWAYS_ANSWERED = ("/health", "/ready")
"""First of all requests, and above the limit of connections."""
MAX_CONNECTIONS = 1024
RESERVED = 64
"""Places of connections above the limit, which may ask how the server is."""
ENDS_PER_LOOK = 64
_OTHER_DESCRIPTORS = 512
"""Kept free for ranks, their pulls of media, and child processes."""
_SEARCH_S = 0.1


class HasPlace(Protocol):
    """A connection."""

    app: Any

    def look(self, now: float) -> bool:
        """End it if its phase has taken too long; whether it did."""

    def yields_since(self, now: float) -> float | None:
        """Since when another client may have its place; None if it may not."""

    def drop(self) -> None:
        """End it at once."""


@dataclass(frozen=True)
class PlaceLimits:
    max_connections: int
    reserved: int

    @classmethod
    def of_process(cls) -> PlaceLimits:
        """Below what the process may open; at most half of that where it is little."""
        limit = descriptor_limit()
        total = min(MAX_CONNECTIONS + RESERVED, limit - min(_OTHER_DESCRIPTORS, limit // 2))
        reserved = min(RESERVED, total // 4)
        return cls(total - reserved, reserved)


class Places:
    """All connections. When there are too many, the one goes that has kept its place for nothing for longest.

    Where nobody does, a new one gets a reserved place: `ALWAYS_ANSWERED` or a 503, and then it is closed. The oldest
    of these goes when there are too many of them.
    """

    def __init__(self, limits: PlaceLimits) -> None:
        self.limits = limits
        self._connections: dict[HasPlace, None] = {}
        self._reserved: dict[HasPlace, None] = {}
        self._yielding: deque[HasPlace] = deque()
        self._searched_at = float("-inf")

    def __len__(self) -> int:
        return len(self._connections) + len(self._reserved)

    def take(self, connection: HasPlace) -> None:
        if len(self._connections) < self.limits.max_connections or self._make_room():
            self._connections[connection] = None
            return
        if len(self._reserved) >= self.limits.reserved:
            oldest = next(iter(self._reserved))
            del self._reserved[oldest]
            oldest.drop()
        self._reserved[connection] = None
        connection.app = _reserved(connection.app)

    def give_back(self, connection: HasPlace) -> None:
        self._connections.pop(connection, None)
        self._reserved.pop(connection, None)

    def look(self, now: float) -> None:
        """See `HasPlace.look`. Ends so many at a time that nothing else waits for it."""
        num_ended = 0
        for connection in [*self._connections, *self._reserved]:
            num_ended += connection.look(now)
            if num_ended >= ENDS_PER_LOOK:
                return

    def _make_room(self) -> bool:
        now = time.monotonic()
        if not self._yielding and now - self._searched_at >= _SEARCH_S:
            self._searched_at = now
            since = {connection: connection.yields_since(now) for connection in self._connections}
            found = [(start, n, connection) for n, (connection, start) in enumerate(since.items()) if start is not None]
            self._yielding.extend(connection for _, _, connection in sorted(found, key=lambda entry: entry[:2]))
        while self._yielding:
            connection = self._yielding.popleft()
            if connection in self._connections and connection.yields_since(now) is not None:
                del self._connections[connection]
                connection.drop()
                return True
        return False


def _reserved(app: ASGIApp) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        if scope["path"] in ALWAYS_ANSWERED:
            await app(scope, receive, send_last)
        else:
            await error_response(UnavailableError("too many connections"))(scope, receive, send_last)

    return answer

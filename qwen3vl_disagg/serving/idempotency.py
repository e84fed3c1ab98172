"""`Idempotency-Key`: a request that is sent again gets the answer of the first one, also while that is being made, when
its client has left, or its frontend died.

The request runs apart from the connection that brought it: what it sends is recorded, and everybody who shows the key
is sent the record from its beginning. Only answers that are whole and good are kept after their end (`AnswerStore`);
what failed may be tried again. Language ranks keep what they have said under a name that follows from key and body, so
that a request whose frontend died goes on where it was (`language/kept_answers.py`).

The header is that of draft-ietf-httpapi-idempotency-key-header, without its quotes; 422 for another body is from there.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3vl_disagg.cluster.answer_store import AnswerStore
from qwen3vl_disagg.core.errors import InputError, UnavailableError
from qwen3vl_disagg.serving.body import ClientGone
from qwen3vl_disagg.serving.guard import SALT
from qwen3vl_disagg.serving.intake import KEEP_AS, until_disconnect
from qwen3vl_disagg.serving.limits import Limits
from qwen3vl_disagg.serving.stream import FAILED

HEADER, REPLAYED = "Idempotency-Key", (b"idempotent-replayed", b"true")
ALONE_S = 60.0
"""So long a request goes on that nobody listens to."""
MAX_RECORD_BYTES = 8 * 2**20
"""An answer that is larger cannot be asked for again."""
MAX_RECORDED_BYTES = 256 * 2**20
"""Of all that are being made."""
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class _Stored(msgspec.Struct, array_like=True):
    digest: bytes
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass
class _Recording:
    """A request that is running, and all that it has sent."""

    messages: list[Message] = field(default_factory=list)
    num_bytes: int = 0
    digest: bytes = b""
    """Of its body, once that is whole."""
    is_whole: asyncio.Event = field(default_factory=asyncio.Event)
    is_unwanted: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: bool = False
    has_failed: bool = False
    error: Exception | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)
    num_listeners: int = 0

    def tell(self) -> None:
        """Wake everybody who waits for news."""
        self.news.set()
        self.news = asyncio.Event()

    def stored(self) -> _Stored | None:
        """What can be kept: a whole and good answer."""
        is_good = self.is_over and not self.has_failed and self.error is None and self.num_bytes <= MAX_RECORD_BYTES
        if not is_good or not self.messages or self.messages[-1].get("more_body", False):
            return None
        start, *parts = self.messages
        if start["status"] >= 300:
            return None
        headers = [(bytes(name), bytes(value)) for name, value in start["headers"]]
        return _Stored(self.digest, start["status"], headers, b"".join(part.get("body", b"") for part in parts))


class Idempotency:
    """Before all routes, behind the guards."""

    def __init__(self, app: ASGIApp, store: AnswerStore, limits: Limits) -> None:
        self._app, self._store, self._limits = app, store, limits
        self._running: dict[bytes, _Recording] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_bytes = 0
        store.read_all()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = Headers(scope=scope).get(HEADER) if scope["type"] == "http" and scope["method"] == "POST" else None
        if key is None:
            await self._app(scope, receive, send)
            return
        if not _KEY.fullmatch(key):
            raise InputError(f"{HEADER} must be 1 to 255 visible ASCII characters", param=HEADER)
        salt = scope["state"].get(SALT, "")
        identity = hashlib.sha256("\n".join((salt, scope["path"], key)).encode()).digest()
        if identity in self._running:
            await self._join(self._running[identity], receive, send)
        elif (data := self._store.get(identity)) is not None:
            await self._repeat(msgspec.msgpack.decode(data, type=_Stored), receive, send)
        else:
            await self._begin(identity, scope, receive, send)

    # ---- the first ----

    async def _begin(self, identity: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_room()
        record = self._running[identity] = _Recording(num_listeners=1)
        task = asyncio.create_task(self._run(identity, record, scope, receive))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while not record.is_whole.is_set() and not record.is_over:
                await record.news.wait()
            await self._listen(record, receive, send, is_first=True)
        finally:
            self._left(record)

    async def _run(self, identity: bytes, record: _Recording, scope: Scope, receive: Receive) -> None:
        hashed = hashlib.sha256()

        async def body() -> Message:
            if record.is_whole.is_set():
                await record.is_unwanted.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            hashed.update(message.get("body", b""))
            if message["type"] == "http.request" and not message.get("more_body", False):
                record.digest = hashed.digest()
                scope["state"][KEEP_AS] = hashlib.sha256(identity + record.digest).hexdigest()
                record.is_whole.set()
                record.tell()
            return message

        async def note(message: Message) -> None:
            if message.pop(FAILED, False):
                record.has_failed = True
            else:
                self._check_room()
            record.messages.append(message)
            num_bytes = len(message.get("body", b""))
            record.num_bytes, self._num_bytes = record.num_bytes + num_bytes, self._num_bytes + num_bytes
            record.tell()

        try:
            await self._app(scope, body, note)
        except Exception as error:  # everybody who listens hears of it
            record.error = error
        finally:
            record.is_over = True
            self._num_bytes -= record.num_bytes
            if self._running.get(identity) is record:
                del self._running[identity]
            if (stored := record.stored()) is not None:
                self._store.put(identity, msgspec.msgpack.encode(stored))
            record.tell()

    def _check_room(self) -> None:
        """Nobody's slow reading holds an answer up, so this does. UnavailableError."""
        if self._num_bytes > MAX_RECORDED_BYTES:
            raise UnavailableError(f"too much is being answered to requests with {HEADER}")

    def _left(self, record: _Recording) -> None:
        record.num_listeners -= 1

        def look() -> None:
            if not record.num_listeners:
                record.is_unwanted.set()

        if not record.num_listeners and not record.is_over:
            asyncio.get_running_loop().call_later(ALONE_S, look)

    # ---- the others ----

    async def _join(self, record: _Recording, receive: Receive, send: Send) -> None:
        record.num_listeners += 1
        try:
            digest = await self._digest(receive)
            async with asyncio.timeout(self._limits.body_timeout_s):
                while not record.is_whole.is_set() and not record.is_over:
                    await record.news.wait()
            _check(digest, record.digest)
            if record.num_bytes > MAX_RECORD_BYTES:
                reason = f"the answer to the first request with this {HEADER} is too large to be sent again"
                raise InputError(reason, param=HEADER, status=409, code="answer_too_large")
            await self._listen(record, receive, send, is_first=False)
        finally:
            self._left(record)

    async def _repeat(self, stored: _Stored, receive: Receive, send: Send) -> None:
        _check(await self._digest(receive), stored.digest)
        headers = [*stored.headers, REPLAYED]
        await send({"type": "http.response.start", "status": stored.status, "headers": headers})
        await send({"type": "http.response.body", "body": stored.body, "more_body": False})

    async def _digest(self, receive: Receive) -> bytes:
        """Of a body, within its bounds; nothing of it is kept."""
        hashed, num_bytes, is_whole = hashlib.sha256(), 0, False
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while not is_whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunk, is_whole = message.get("body", b""), not message.get("more_body", False)
                    num_bytes += len(chunk)
                    if num_bytes > self._limits.max_body_bytes:
                        raise InputError("the body is larger than that of any request", status=413, code="too_large")
                    hashed.update(chunk)
        except TimeoutError:
            raise InputError("the body came too slowly", status=408, code="body_timeout") from None
        return hashed.digest()

    async def _listen(self, record: _Recording, receive: Receive, send: Send, *, is_first: bool) -> None:
        """Send what there is, and what comes, until it is over or this client leaves. Raises what the request did."""
        await until_disconnect(receive, self._follow(record, send, None if is_first else REPLAYED))

    async def _follow(self, record: _Recording, send: Send, mark: tuple[bytes, bytes] | None) -> None:
        num_sent = 0
        while True:
            for message in record.messages[num_sent:]:
                copy: dict[str, Any] = dict(message)
                if "headers" in copy:
                    copy["headers"] = [*copy["headers"], *([mark] if mark else [])]
                try:
                    async with asyncio.timeout(self._limits.send_timeout_s):
                        await send(copy)
                except (TimeoutError, OSError):
                    raise ClientGone from None
                num_sent += 1
            if num_sent < len(record.messages):
                continue
            if record.is_over:
                break
            await record.news.wait()
        if record.error is not None:
            raise record.error


def _check(digest: bytes, first: bytes) -> None:
    if digest != first:
        reason = f"this {HEADER} was used for a request with another body"
        raise InputError(reason, param=HEADER, status=422, code="idempotency_key_reused")

"""A hub on a real socket, and scripted ranks that connect to it."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.checkpoint.download import resolve_model_folder
from qwen3vl_disagg.cluster.backend import PromptCall
from qwen3vl_disagg.cluster.hub import Hub
from qwen3vl_disagg.cluster.job_memory import JobMemory
from qwen3vl_disagg.cluster.media_store import MediaStore
from qwen3vl_disagg.cluster.rendezvous import Layout, host_id
from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.core.requests import RequestTimings, SamplingParams, VisualItem
from qwen3vl_disagg.processing import Prompt
from qwen3vl_disagg.protocol.messages import (
    Blob,
    Finished,
    LinksUp,
    Message,
    NeedItems,
    Pull,
    RankHello,
    Refused,
    Submit,
    Tokens,
    Welcome,
)
from qwen3vl_disagg.protocol.routing import RouterLimits
from qwen3vl_disagg.transport.control import Connection, ConnectionLost, connect_hub

TOKEN = "the token"
CONFIG = read_config(resolve_model_folder(None))
FINGERPRINT = {"dtype": "float32", "hidden_size": "128"}
WAIT_S = 20.0


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test to its end, or to a deadline."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def limited() -> None:
            async with asyncio.timeout(60.0):
                await test(*args, **kwargs)

        asyncio.run(limited())

    return run


def prompt_with(*images: bytes) -> Prompt:
    """A prompt with these images (any bytes: nobody decodes them here)."""
    items = [
        VisualItem(
            modality="image",
            digest=hashlib.sha256(data).hexdigest(),
            num_bytes=len(data),
            grid=(1, 8, 8),
            num_rows=16,
            offset=2 + 20 * n,
            param=f"messages[0].content[{n}]",
        )
        for n, data in enumerate(images)
    ]
    return Prompt([1, 2, 3], items, list(images))


class FakeRank:
    """One rank's end of the hub connection. What arrives is kept until it is asked for by type."""

    def __init__(self, role: str, rank: int | None, connection: Connection) -> None:
        self.role, self.rank, self.connection = role, rank, connection
        self.inbox: list[Message] = []
        self.is_lost = False
        self._changed = asyncio.Condition()
        self._reader: asyncio.Task[None] | None = None

    def listen(self) -> None:
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            while True:
                message = await self.connection.receive()
                async with self._changed:
                    self.inbox.append(message)
                    self._changed.notify_all()
        except ConnectionLost:
            async with self._changed:
                self.is_lost = True
                self._changed.notify_all()

    async def expect(self, kind: type, **fields: Any) -> Any:
        """Take the first message of this type with these fields out of the inbox."""

        def fits(message: Message) -> bool:
            return isinstance(message, kind) and all(getattr(message, k) == v for k, v in fields.items())

        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(lambda: any(map(fits, self.inbox)) or self.is_lost)
            found = next((message for message in self.inbox if fits(message)), None)
            assert found is not None, f"the connection ended without {kind.__name__}; there is {self.inbox}"
            self.inbox.remove(found)
            return found

    async def lost(self) -> None:
        """Wait until the hub has closed the connection."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(lambda: self.is_lost)

    async def tell(self, message: Message) -> None:
        await self.connection.send(message)

    async def answer(self, submit: Submit, *token_ids: int, sample: int = 0) -> None:
        """Tokens one by one, then the end."""
        name = submit.request_id
        for index, token_id in enumerate(token_ids):
            await self.tell(Tokens(request_id=name, index=index, token_ids=[token_id], sample=sample))
        timings = RequestTimings(language_rank=self.rank)
        await self.tell(Finished(request_id=name, finish_reason="stop", timings=timings, sample=sample))

    async def need_all(self, submit: Submit) -> None:
        await self.tell(NeedItems(request_id=submit.request_id, items=list(range(len(submit.items)))))

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        await self.connection.close()

    def die(self) -> None:
        """The end of the stream, as when the process is killed."""
        self.connection.abort()


class System:
    """A hub, and a way to let ranks in. An async context manager."""

    def __init__(
        self,
        world: int = 4,
        num_encode: int | None = 2,
        *,
        media: MediaStore | None = None,
        memory: JobMemory | None = None,
        limits: RouterLimits | None = None,
    ) -> None:
        self.layout = Layout.of(world, num_encode)
        self.hub = Hub(CONFIG, self.layout, TOKEN, media=media, memory=memory, limits=limits)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.setblocking(False)
        self.address: tuple[str, int] = self.socket.getsockname()[:2]
        self.ranks: list[FakeRank] = []

    async def __aenter__(self) -> System:
        await self.hub.serve(self.socket)
        return self

    async def __aexit__(self, *_: object) -> None:
        for rank in self.ranks:
            await rank.close()
        await self.hub.close(0.05)
        self.socket.close()

    async def connect(self, role: Any, rank: int | None, **changes: Any) -> FakeRank:
        """Say hello; the answer is left in the inbox."""
        fields: dict[str, Any] = {"token": TOKEN, "pid": os.getpid(), "host": host_id(), "fingerprint": FINGERPRINT}
        fake = FakeRank(role, rank, await connect_hub(self.address, deadline_s=WAIT_S))
        self.ranks.append(fake)
        fake.listen()
        await fake.tell(RankHello(role=role, rank=rank, **{**fields, **changes}))
        return fake

    async def join(self, role: Any, rank: int, **changes: Any) -> FakeRank:
        """A rank that is welcome; an encode rank reports links to all language ranks."""
        fake = await self.connect(role, rank, **changes)
        await fake.expect(Welcome)
        if role == "encode":
            await fake.tell(LinksUp(language_ranks=list(self.layout.language_ranks)))
        return fake

    async def join_all(self) -> tuple[dict[int, FakeRank], dict[int, FakeRank]]:
        """Encode ranks and language ranks, up and linked."""
        language = {rank: await self.join("language", rank) for rank in self.layout.language_ranks}
        encode = {rank: await self.join("encode", rank) for rank in self.layout.encode_ranks}
        await self.until(lambda: not self.hub.readiness().degraded and self.hub.readiness().ready)
        return encode, language

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.005)

    def submit(self, *images: bytes, timeout_s: float = 100.0) -> Any:
        [handle] = self.submit_all(*images, timeout_s=timeout_s)
        return handle

    def submit_all(self, *images: bytes, timeout_s: float = 100.0, n: int = 1, target_s: float = FIRST_COME) -> Any:
        """`n` answers to one prompt."""
        prompt, sampling = prompt_with(*images), SamplingParams(max_new_tokens=5, n=n)
        self.hub.media.hold(prompt.items, prompt.media)
        token_ids = np.asarray(prompt.token_ids, dtype="<i4").tobytes()
        call = PromptCall(token_ids=token_ids, items=prompt.items, sampling=sampling, target_s=target_s)
        return self.hub.submit([call], timeout_s)


async def collect(handle: Any) -> list[Any]:
    """All events of a request; an error is the last entry."""
    events: list[Any] = []
    try:
        async with asyncio.timeout(WAIT_S):
            async for event in handle:
                events.append(event)
    except Exception as error:
        events.append(error)
    return events


async def submitted_to(language: dict[int, FakeRank], request_id: str) -> tuple[FakeRank, Submit]:
    """The language rank that got the request."""
    waits = {asyncio.create_task(rank.expect(Submit, request_id=request_id)): rank for rank in language.values()}
    done, pending = await asyncio.wait(waits, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    [task] = done
    return waits[task], task.result()


async def pull(system: System, digest: str, token: str = TOKEN) -> bytes | None:
    connection = await connect_hub(system.address, deadline_s=WAIT_S)
    try:
        await connection.send(Pull(token=token, digest=digest))
        blob = await connection.receive(timeout=WAIT_S)
        if isinstance(blob, Refused):
            raise HandshakeError(blob.field, blob.expected, blob.got)
        assert isinstance(blob, Blob)
        return None if blob.num_bytes < 0 else await connection.receive_bytes(blob.num_bytes, WAIT_S)
    finally:
        await connection.close()

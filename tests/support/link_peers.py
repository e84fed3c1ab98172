"""The other end of a link, played by a test frame by frame: an encode rank, or a language rank."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.server import EncodeServer
from qwen3vl_disagg.encode.worker import EncodedItem
from qwen3vl_disagg.language.link_server import LinkServer
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.protocol.messages import (
    Abort,
    Ack,
    Assign,
    Beat,
    Cancel,
    Frame,
    Grant,
    HeaderOk,
    LinkAccept,
    LinkHello,
    LinkMessage,
    LinkReady,
    Message,
    Refused,
    Room,
)
from qwen3vl_disagg.protocol.session_events import Expect, SessionLimits
from qwen3vl_disagg.transport.buffers import MultimodalDataBuffers
from qwen3vl_disagg.transport.control import MAX_LINK_FRAME, Connection, ConnectionLost, connect_link
from qwen3vl_disagg.transport.links import InProcessLink, Link, in_process_links
from tests.support.link_scenarios import BLOCK, CONFIG, LANGUAGE_RANK, LIMITS, TOKEN, Engine, FakeHub, System, until
from tests.support.transfer import make_encoded, make_visual

VISUAL = make_visual(CONFIG)  # 6 rows: two blocks
FINGERPRINT = {"protocol": "1"}
WAIT_S = 8.0


@dataclass
class Peer:
    """One end of one link, with its count of frames."""

    control: Connection
    link: Link
    epoch: int
    num_said: int = 0
    num_heard: int = 0

    def frame(self, body: Any) -> Frame:
        self.num_said += 1
        return Frame(epoch=self.epoch, seq=self.num_said, body=body)

    async def say(self, body: Any) -> None:
        await self.control.send(self.frame(body))

    async def hear(self, kind: type | None = None, timeout: float = WAIT_S) -> Any:
        """The next frame's body, of this kind."""
        while True:
            frame = await self.control.receive(timeout)
            assert isinstance(frame, Frame), frame
            assert frame.epoch == self.epoch
            self.num_heard += type(frame.body) is not Beat
            assert frame.seq == self.num_heard, "a frame is missing"
            if type(frame.body) is not Beat:
                assert kind is None or type(frame.body) is kind, frame.body
                return frame.body

    async def ended(self) -> None:
        """Wait until the other end has dropped the connection."""
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    await self.control.receive()
        except ConnectionLost:
            await self.control.close()

    async def deliver(self, grant: Room, seed: int = 0) -> EncodedItem:
        """As an encode rank: header and payload, up to the acknowledgement."""
        encoded = make_encoded(CONFIG, seed=seed)
        await self.say(encoded.header(grant))
        assert (await self.hear(HeaderOk)).row_start == grant.row_start
        self.link.send(encoded.payload(grant), 1)
        assert (await self.hear(Ack)).received == grant.row_stop
        return encoded

    async def take(self, grant: Room, encoded: EncodedItem) -> None:
        """As a language rank: the payload of a header that was heard, which has to be this item's."""
        ids = {"request_id": grant.request_id, "item": grant.item, "attempt": grant.attempt}
        await self.say(HeaderOk(**ids, row_start=grant.row_start))
        expected = encoded.payload(grant)
        got = await asyncio.to_thread(lambda: list(self.link.receive([torch.empty_like(t) for t in expected], WAIT_S)))
        assert all(map(torch.equal, got, expected))
        await self.say(Ack(**ids, received=grant.row_stop))


@dataclass
class Language:
    """A link server whose encode ranks are played by the test."""

    system: System
    make_link: Any
    address: tuple[str, int]
    peers: list[Peer] = field(default_factory=list)

    @property
    def server(self) -> LinkServer:
        return self.system.links

    @property
    def engine(self) -> Engine:
        return self.system.engine

    async def connect(self, encode_rank: int, *, token: str = TOKEN) -> Peer:
        control = await connect_link(self.address, deadline_s=5)
        hello = LinkHello(token=token, encode_rank=encode_rank, pid=os.getpid(), fingerprint=FINGERPRINT)
        await control.send(hello)
        accept = await control.receive(WAIT_S)
        if isinstance(accept, Refused):
            await control.close()
            raise ConnectionLost(accept.field)
        link = self.make_link("encode", encode_rank, LANGUAGE_RANK, accept.epoch)
        assert isinstance(await control.receive(WAIT_S), LinkReady)
        self.peers.append(Peer(control.keep_alive(), link, accept.epoch))
        return self.peers[-1]

    def expect(
        self, name: str, *, attempt: int = 1, encode_rank: int = 0, timeout_s: float = 60, num_items: int = 1
    ) -> None:
        """A request; or later attempts at its items."""
        items = list(range(num_items))
        if attempt == 1:
            self.server.handle(Expect(name, [VISUAL] * num_items, items, time.monotonic() + timeout_s))
        for item in items:
            self.server.handle(Assign(request_id=name, item=item, attempt=attempt, encode_rank=encode_rank))

    async def has_rows(self, name: str, encoded: EncodedItem) -> int:
        """They are there, with these bits; the attempt that they came with."""
        rows, delivery = await self.engine.item(name, 0, WAIT_S)
        assert torch.equal(rows, torch.cat([encoded.main, encoded.deepstack], dim=1))
        return delivery.timings.attempts

    def counts(self) -> tuple[int, int, int]:
        """(free, owned, quarantined) row blocks."""
        return self.server.sessions.allocator.counts("rows")


@asynccontextmanager
async def language(*, blocks: int = 2, limits: SessionLimits = LIMITS) -> AsyncIterator[Language]:
    buffers = MultimodalDataBuffers(CONFIG, num_rows=blocks * BLOCK, num_deepstack_rows=64, block_size=BLOCK)
    receiver, make_link = Receiver(buffers, CONFIG), in_process_links()
    server = LinkServer(
        receiver,
        fingerprint=FINGERPRINT,
        token=TOKEN,
        language_rank=LANGUAGE_RANK,
        make_link=make_link,
        limits=limits,
    )
    system = System(FakeHub(), ("", 0), server, Engine(server), receiver, limits, make_link)
    it = Language(system, make_link, await server.serve())
    try:
        yield it
        for name in list(server.sessions.requests):
            server.handle(Cancel(request_id=name))
        await until(lambda: not system.leftovers(), WAIT_S, system.leftovers)
    finally:
        await server.close()
        for peer in it.peers:
            await peer.control.close()


class FakeWorker:
    """Every item is `make_encoded` of this seed."""

    config = CONFIG

    def __init__(self) -> None:
        self.seed = 0
        self.decoded: list[bytes] = []
        self.batches: list[list[bytes]] = []
        self.faults: dict[bytes, Exception] = {}
        """Content -> what goes wrong with it in the tower."""
        self.decode_gate, self.gate = threading.Event(), threading.Event()
        self.open()

    @property
    def num_encoded(self) -> int:
        return sum(map(len, self.batches))

    def open(self) -> None:
        self.decode_gate.set()
        self.gate.set()

    def preprocess(self, data: bytes, visual: VisualItem, stop: object = None) -> bytes:
        self.decoded.append(data)
        if not self.decode_gate.wait(20):
            raise RuntimeError("decoding was held up for too long")
        return data

    def encode(self, batch: Sequence[Any], visual_token_ids: Sequence[int]) -> list[EncodedItem | Exception]:
        assert len(batch) == len(visual_token_ids)
        self.batches.append(list(batch))
        seed = self.seed
        if not self.gate.wait(20):
            raise RuntimeError("the tower was held up for too long")
        return [self.faults.get(data) or make_encoded(CONFIG, seed=seed) for data in batch]


@dataclass
class EncodeSide:
    """An encode server whose one language rank is played by the test."""

    server: EncodeServer
    worker: FakeWorker
    told: list[Message]
    peers: asyncio.Queue[Peer]

    async def link(self) -> Peer:
        """The language rank's end of the next link."""
        peer = await asyncio.wait_for(self.peers.get(), WAIT_S)
        await until(lambda: (LANGUAGE_RANK, peer.epoch) in self.server._links.linked)
        return peer

    async def cancel(self, peer: Peer, name: str, *, attempt: int = 1) -> None:
        """The language rank wants it no longer, and that has been heard."""
        await peer.say(Abort(request_id=name, item=0, attempt=attempt, reason="no longer wanted"))
        items, key = self.server.sessions.items, (name, 0, attempt)
        await until(lambda: key not in items or items[key].is_dropped)

    def said(self, kind: type) -> list[Any]:
        return [message for message in self.told if type(message) is kind]

    def leftovers(self) -> dict[str, Any]:
        server = self.server
        tables = {"items": server.sessions.items, "tasks": server._tasks}
        tables |= {
            "encoded": server._encoded,
            "pinned": range(server.pipeline.cache.num_pinned_bytes),
            "busy": [] if server.sessions.is_idle else ["busy"],
        }
        return {name: list(table) for name, table in tables.items() if table}


@asynccontextmanager
async def encode_side(
    *, limits: SessionLimits = LIMITS, pull: Any = None, wrap: Any = None, options: EncodeOptions | None = None
) -> AsyncIterator[EncodeSide]:
    """`wrap` may put something around the factory of the encode side's links."""
    make_link, peers, told = in_process_links(), asyncio.Queue[Peer](), []
    num_links, controls = 0, []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_links
        num_links += 1
        epoch = num_links
        control = Connection(reader, writer, messages=LinkMessage, max_frame=MAX_LINK_FRAME)
        controls.append(control)
        try:
            assert isinstance(await control.receive(WAIT_S), LinkHello)
            await control.send(LinkAccept(epoch=epoch, language_rank=LANGUAGE_RANK))
            await control.send(LinkReady())
        except ConnectionLost:
            return
        payload = make_link("language", 0, LANGUAGE_RANK, epoch)
        assert isinstance(payload, InProcessLink)
        peers.put_nowait(Peer(control.keep_alive(), payload, epoch))

    async def content(digest: str, num_bytes: int) -> bytes:
        return digest.encode()

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    host, port = listener.sockets[0].getsockname()[:2]
    hello = LinkHello(token=TOKEN, encode_rank=0, pid=os.getpid(), fingerprint=FINGERPRINT)
    worker: Any = FakeWorker()
    refused: list[Exception] = []
    server = EncodeServer(
        worker,
        hello,
        tell=told.append,
        pull=pull or content,
        on_refused=refused.append,
        limits=limits,
        options=options,
    )
    server.connect([(LANGUAGE_RANK, host, port)], wrap(make_link) if wrap else make_link)
    it = EncodeSide(server, worker, told, peers)
    try:
        yield it
        await until(lambda: not it.leftovers(), WAIT_S, it.leftovers)
        assert not refused
    finally:
        worker.open()
        await server.close()
        listener.close()
        for control in controls:
            await control.close()


def make_grant(
    name: str,
    *,
    attempt: int = 1,
    start: int = 0,
    stop: int = 6,
    kind: type[Room] = Grant,
    content: str = "",
    timeout_s: float = 30.0,
) -> Room:
    """`content`: of the image; without it, each name has its own."""
    deepstack = 0 if start else 6
    item = {"visual": msgspec.structs.replace(VISUAL, digest=content or name), "timeout_s": timeout_s}
    return kind(
        request_id=name,
        item=0,
        attempt=attempt,
        row_start=start,
        row_stop=stop,
        deepstack_start=start,
        deepstack_stop=start + deepstack,
        row_runs=[stop - start],
        deepstack_runs=[deepstack] if deepstack else [],
        **(item if kind is Grant else {}),
    )

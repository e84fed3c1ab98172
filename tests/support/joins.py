"""A job that encode ranks join and leave, on one loop: hub, link server, store and links are real; the language rank
reads rows at once and answers with one token, the ranks that join encode nothing but made-up rows."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from qwen3vl_disagg.cluster.backend import FinishedEvent, PromptCall
from qwen3vl_disagg.cluster.rendezvous import host_id
from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.core.requests import ItemTimings, RequestTimings, SamplingParams, VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.rank import EncodeRank
from qwen3vl_disagg.language.link_server import LinkServer
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.protocol.messages import (
    Assign,
    Cancel,
    Finished,
    LinkAccept,
    LinkAddress,
    LinkHello,
    Message,
    NeedItems,
    RankHello,
    Submit,
    Tokens,
)
from qwen3vl_disagg.protocol.session_events import Consumed, Expect, Recall, Returned, SessionLimits
from qwen3vl_disagg.serving.metrics import Metrics
from qwen3vl_disagg.transport.buffers import MultimodalDataBuffers
from qwen3vl_disagg.transport.control import connect_link
from qwen3vl_disagg.transport.links import process_group_links
from tests.support.fake_ranks import FINGERPRINT, TOKEN, FakeRank, System
from tests.support.held import look
from tests.support.link_peers import FakeWorker
from tests.support.link_scenarios import BLOCK, CONFIG, until
from tests.support.transfer import make_visual

LANGUAGE = 1
FORGET_S, MEET_S = 1.0, 0.5
ENDS = ("leaves", "leaves", "dies", "dies at work", "dies in the handshake", "is refused", "has no token")
"""How the ranks end, that come one after another."""


@dataclass
class Language:
    """The language rank, but for its engine: what the hub says goes to the link server, and back."""

    rank: FakeRank
    links: LinkServer
    submits: dict[str, Submit] = field(default_factory=dict)
    timings: dict[str, ItemTimings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.links.on_rows, self.links.on_tell = self._rows, self._post
        self.links.on_recall = lambda recall: self.links.handle(Returned(*_key(recall)))
        self.links.on_short_of_room = lambda _: None

    def _post(self, message: Message) -> None:
        self.rank.connection.post(message)

    def _rows(self, attempt: tuple[str, int, int]) -> None:
        delivery = self.links.receiver.delivery(attempt)
        assert delivery is not None
        self.links.handle(Consumed(*attempt, delivery.rows.stop))
        submit = self.submits.get(attempt[0])
        if submit is not None and delivery.rows.stop == submit.items[0].num_rows:
            del self.submits[attempt[0]]
            timings = RequestTimings(items=[delivery.timings], language_rank=LANGUAGE)
            ids = {"request_id": submit.request_id, "timings": timings}
            self._post(Tokens(**ids, index=0, token_ids=[7]))
            self._post(Finished(**ids, finish_reason="stop"))
            self.links.handle(Cancel(request_id=submit.request_id))

    async def run(self) -> None:
        while True:
            message = await self.rank.connection.receive()
            match message:
                case Submit():
                    self.submits[message.request_id] = message
                    deadline = time.monotonic() + message.timeout_s
                    self.links.handle(Expect(message.request_id, message.items, [0], deadline))
                    self._post(NeedItems(request_id=message.request_id, items=[0]))
                case Assign():
                    self.links.handle(message)
                case Cancel():
                    self.submits.pop(message.request_id, None)
                    self.links.handle(message)


def _key(recall: Recall) -> tuple[str, int, int]:
    return recall.request_id, recall.item, recall.attempt


@dataclass
class Job:
    system: System
    links: LinkServer
    metrics: Metrics
    language: Language
    num_come: int = 0
    ends: Counter[str] = field(default_factory=Counter)

    def holds(self) -> Counter[str]:
        """What is held of ranks that came, in all places where it could be."""
        found = look(hub=self.system.hub, links=self.links, receiver=self.links.receiver, metrics=self.metrics)
        found["series"] = sum(len(family.samples) for family in self.metrics._registry.collect())
        return found

    async def settled(self) -> Counter[str]:
        """As `holds`, when what is remembered for a while has been forgotten."""
        await asyncio.sleep(FORGET_S + 2 * MEET_S + 0.5)
        await self.metrics.show(Request({"type": "http", "headers": []}))
        return self.holds()

    async def come_and_go(self, end: str, rng: random.Random) -> None:
        """One rank, from its hello to its end."""
        self.num_come += 1
        match end:
            case "is refused":
                with contextlib.suppress(HandshakeError):
                    await self._rank({**FINGERPRINT, "dtype": "another"}).run()
                    raise AssertionError("a rank with another fingerprint was let in")
            case "has no token":
                stranger = await self.system.connect("encode", None, token="another")
                await stranger.lost()
                self.system.ranks.remove(stranger)
                await stranger.close()
            case "dies in the handshake":
                await self._die_in_handshake()
            case _:
                await self._join(end, rng)
        self.ends[end] += 1

    def _rank(self, fingerprint: dict[str, str] = FINGERPRINT) -> EncodeRank:
        hello = RankHello(
            token=TOKEN, role="encode", rank=None, pid=os.getpid(), host=host_id(), fingerprint=fingerprint
        )
        options = EncodeOptions(embedding_cache_mib=1)
        return EncodeRank(FakeWorker(), hello, self.system.address, options=options, reconnect_s=5.0)

    async def _die_in_handshake(self) -> None:
        """It was accepted, and has said where it is."""
        control = await connect_link(self.language.rank.link_address, deadline_s=5)
        number = 10_000 + self.num_come
        await control.send(LinkHello(token=TOKEN, encode_rank=number, pid=1, fingerprint=FINGERPRINT))
        assert isinstance(await control.receive(5), LinkAccept)
        await control.send(LinkAddress(address=b"somewhere"))
        control.abort()
        await control.close()

    async def _join(self, end: str, rng: random.Random) -> None:
        body = self._rank()
        task = asyncio.create_task(body.run())
        hub = self.system.hub
        await until(lambda: LANGUAGE in hub._router.linked_language_ranks, 10, lambda: task)
        number = body.server._links.hello.encode_rank
        worker = body.server.pipeline._worker
        if end != "dies at work":
            assert await self.ask(rng) == number
        if end == "leaves":
            body.leave()
            assert await asyncio.wait_for(task, 10) == 0
        else:
            if end == "dies at work":
                worker.decode_gate.clear()
                handle = self.submit(rng)
                await until(lambda: worker.decoded)
            for link in body.server._links._links.values():
                link.control.abort()
            body._hub.abort()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            worker.open()
            if end == "dies at work":
                handle.cancel()
        await until(lambda: ("encode", number) not in hub._ranks and number not in self.links.sessions.links)

    def submit(self, rng: random.Random) -> Any:
        data = rng.randbytes(8)
        base = make_visual(CONFIG)
        item = VisualItem(
            modality="image",
            digest=hashlib.sha256(data).hexdigest(),
            num_bytes=len(data),
            grid=base.grid,
            num_rows=base.num_rows,
            offset=0,
            param="messages[0]",
        )
        self.system.hub.media.hold([item], [data])
        call = PromptCall(token_ids=b"\1\0\0\0", items=[item], sampling=SamplingParams(max_new_tokens=1))
        [handle] = self.system.hub.submit([call], 30.0)
        return handle

    async def ask(self, rng: random.Random) -> int:
        """One image; the rank that encoded it."""
        async with asyncio.timeout(10):
            async for event in self.submit(rng):
                if isinstance(event, FinishedEvent):
                    self.metrics.prompted(1, event.timings)
                    return event.timings.items[0].encode_rank
        raise AssertionError("an answer without an end")


@asynccontextmanager
async def job() -> AsyncIterator[Job]:
    """One language rank; the slot's own encode rank is not there, so that those that join have to do the work."""
    buffers = MultimodalDataBuffers(CONFIG, num_rows=16 * BLOCK, num_deepstack_rows=64, block_size=BLOCK)
    links = LinkServer(
        Receiver(buffers, CONFIG),
        fingerprint=FINGERPRINT,
        token=TOKEN,
        language_rank=LANGUAGE,
        make_link=process_group_links("127.0.0.1", timeout_s=MEET_S),
        limits=SessionLimits(forget_s=FORGET_S, suspend_s=0.2),
    )
    address = await links.serve()
    async with System(world=2, num_encode=1) as system:
        rank = await system.connect("language", LANGUAGE, link_address=address)
        await until(lambda: system.hub._router.language_ranks)
        rank._reader.cancel()
        rank.link_address = address
        language = Language(rank, links)
        reader = asyncio.create_task(language.run())
        try:
            yield Job(system, links, Metrics(system.hub), language)
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            await links.close()


async def joins(job: Job, count: int, seed: int, on_each: Callable[[int], None] = lambda n: None) -> None:
    """So many come and go, one after another, each in a way that the seed chooses."""
    rng = random.Random(seed)
    order = [ENDS[n % len(ENDS)] for n in range(count)]
    rng.shuffle(order)
    for number, end in enumerate(order):
        await job.come_and_go(end, rng)
        on_each(number)

"""Encode ranks and a language rank's link server, whole, on one loop; the test plays the frontend and the engine."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qwen3vl_disagg.cluster.registry import link_fingerprint
from qwen3vl_disagg.core.requests import ItemTimings, VisualItem
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.rank import EncodeRank
from qwen3vl_disagg.language.link_server import LinkServer
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.media.images import probe_image
from qwen3vl_disagg.processing import ImageProcessor
from qwen3vl_disagg.processing.patches import PixelSettings
from qwen3vl_disagg.protocol.messages import (
    Assign,
    Blob,
    Cancel,
    HubMessage,
    ItemLost,
    ItemReceived,
    LinksUp,
    Message,
    Peers,
    Pull,
    RankHello,
    RequestFailed,
    Welcome,
)
from qwen3vl_disagg.protocol.session_events import (
    Attempt,
    Consumed,
    Expect,
    Recall,
    Returned,
    SessionLimits,
)
from qwen3vl_disagg.transport.buffers import Delivery, MultimodalDataBuffers
from qwen3vl_disagg.transport.control import MAX_HUB_FRAME, Connection
from qwen3vl_disagg.transport.links import LinkFactory, in_process_links, process_group_links
from tests.support.flaky_links import CountingWorker, FlakyLinks
from tests.support.random_model import random_vision_model, small_config

CONFIG = small_config()
TOKEN = "secret"
BLOCK = 4
LANGUAGE_RANK = 1
MODEL = random_vision_model(CONFIG, seed=1)
PROCESSOR = ImageProcessor(CONFIG.vision, PixelSettings(32 * 32, 256 * 256))
FINGERPRINT = link_fingerprint(
    CONFIG, {"vision_weights": "a digest"}, dtype=torch.float32, block_size=BLOCK, processor=PROCESSOR
)
LIMITS = SessionLimits(payload_s=2.0)
ONE_BY_ONE = EncodeOptions(embedding_cache_mib=0, vision_batch_tokens=0)  # each encoding counts, and has the same bits
_SPARE_FDS = 4
gc.freeze()  # each test looks for what it left behind: not also among all that was imported
_LINK_THREADS = ("link-", "decode", "tower")


async def until(holds: Callable[[], Any], timeout: float = 10, what: Callable[[], Any] = lambda: "") -> None:
    try:
        async with asyncio.timeout(timeout):
            while not holds():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not within {timeout} s {what()}") from None


def run(scenario: Callable[[], Awaitable[None]], timeout: float = 30) -> None:
    """To its end, or a deadline; no task, thread, file descriptor or unheard failure may be left behind."""
    unheard: list[dict[str, Any]] = []

    async def limited() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
        async with asyncio.timeout(timeout):
            await scenario()
        await until(lambda: len(asyncio.all_tasks()) == 1, 5, asyncio.all_tasks)

    gc.collect()
    before, num_fds = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))  # an `LLM` of others has its own
    asyncio.run(limited())
    assert not unheard, unheard
    deadline = time.monotonic() + 5
    while True:
        gc.collect()
        new = set(threading.enumerate()) - before
        threads = [thread.name for thread in new if thread.name.startswith(_LINK_THREADS)]
        extra_fds = len(os.listdir("/proc/self/fd")) - num_fds
        if not threads and extra_fds <= _SPARE_FDS:
            return
        assert time.monotonic() < deadline, f"threads {threads} and {extra_fds} file descriptors are left"
        time.sleep(0.02)


def make_image(seed: int, size: tuple[int, int]) -> bytes:
    """64 x 64 is one block of rows, 128 x 128 four."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def describe(data: bytes) -> VisualItem:
    info = probe_image(data)
    grid = PROCESSOR.grid(info.width, info.height)
    digest = hashlib.sha256(data).hexdigest()
    rows = grid[1] * grid[2] // 4
    return VisualItem(
        modality="image", digest=digest, num_bytes=len(data), grid=grid, num_rows=rows, offset=0, param="messages[0]"
    )


def expect_rows(data: bytes) -> Tensor:
    """`[R, h + n * h]`: rows as the tower makes them."""
    patches, grid = PROCESSOR.pixels(data)
    with torch.inference_mode():
        return MODEL.get_image_feature(patches, [grid])


@dataclass
class FakeHub:
    """The frontend's side of the hub, as far as an encode rank sees it."""

    peers: Peers | None = None
    media: dict[str, bytes] = field(default_factory=dict)
    said: list[Message] = field(default_factory=list)
    ranks: dict[int, Connection] = field(default_factory=dict)
    welcome: Welcome = field(default_factory=Welcome)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer, messages=HubMessage, max_frame=MAX_HUB_FRAME)
        try:
            hello = await connection.receive(timeout=5)
            if isinstance(hello, Pull):
                data = self.media[hello.digest]
                await connection.send(Blob(num_bytes=len(data)))
                return await connection.send_bytes(data, 5)
            self.said.append(hello)
            await connection.send(self.welcome)
            await connection.send(self.peers)
            self.ranks[self.welcome.rank if hello.rank is None else hello.rank] = connection
            while True:
                self.said.append(await connection.receive())
        except Exception:
            return  # the rank left
        finally:
            await connection.close()

    async def until(self, found: Callable[[Message], bool], timeout: float = 15) -> Any:
        """The first message, past or to come, that `found` accepts."""
        await until(lambda: any(map(found, self.said)), timeout, lambda: self.said)
        return next(message for message in self.said if found(message))


class Engine:
    """Copies rows and says that they are consumed: at once, or with `is_holding` when `consume` is called."""

    def __init__(self, links: LinkServer) -> None:
        self.links = links
        self.is_holding = False
        self.answers_recalls = True
        self.held: list[Delivery] = []
        self.deliveries: list[Delivery] = []
        """What was consumed."""
        self.parts: dict[Attempt, list[Tensor]] = {}
        self.arrived: list[ItemReceived] = []
        self.lost: list[ItemLost] = []
        self.recalls: list[Recall] = []
        self.expired: list[RequestFailed] = []
        self.shortages: list[bool] = []
        self.on_loss: Callable[[ItemLost], None] = self.lost.append
        links.on_rows, links.on_recall = self._rows, self._recall
        links.on_short_of_room = self.shortages.append
        links.on_tell = self._hear

    def _hear(self, message: Message) -> None:
        """What the router would."""
        if isinstance(message, ItemLost):
            self.on_loss(message)
        elif isinstance(message, RequestFailed):
            self.expired.append(message)
        elif isinstance(message, ItemReceived):
            self.arrived.append(message)

    def _rows(self, attempt: Attempt) -> None:
        delivery = self.links.receiver.delivery(attempt)
        assert delivery is not None
        self.held.append(delivery)
        if not self.is_holding:
            self.consume(delivery)

    def consume(self, delivery: Delivery) -> None:
        rows = delivery.rows
        attempt = (delivery.request_id, delivery.item, rows.attempt)
        parts = self.parts.setdefault(attempt, [])
        assert rows.start == sum(map(len, parts)), "rows are missing, or came twice"
        main = torch.full((rows.stop - rows.start, 32), torch.nan)
        deepstack = torch.full((rows.stop - rows.start, CONFIG.num_deepstack_levels * 32), torch.nan)
        rows.write(rows.start, rows.stop, main, deepstack)
        parts.append(torch.cat([main, deepstack], dim=1))
        self.held.remove(delivery)
        self.deliveries.append(delivery)
        self.links.handle(Consumed(*attempt, rows.stop))

    def _recall(self, recall: Recall) -> None:
        attempt = (recall.request_id, recall.item, recall.attempt)
        self.recalls.append(recall)
        self.parts.pop(attempt, None)
        if self.answers_recalls:
            self.give_back(recall)

    def give_back(self, recall: Recall) -> None:
        attempt = (recall.request_id, recall.item, recall.attempt)
        self.held = [d for d in self.held if (d.request_id, d.item, d.rows.attempt) != attempt]
        self.links.handle(Returned(*attempt))

    async def item(self, request_id: str, item: int, timeout: float = 20) -> tuple[Tensor, Delivery]:
        """All rows of an item, and the last delivery; once they have arrived."""
        keys: list[Attempt] = []

        def has_arrived() -> bool:
            found = [a for a in self.arrived if (a.request_id, a.item) == (request_id, item)]
            keys[:] = [(request_id, item, a.attempt) for a in found if (request_id, item, a.attempt) in self.parts]
            return bool(keys)

        await until(has_arrived, timeout, lambda: f"{request_id}/{item}; lost: {self.lost}")
        last = [d for d in self.deliveries if (d.request_id, d.item, d.rows.attempt) == keys[-1]][-1]
        return torch.cat(self.parts[keys[-1]]), last


@dataclass
class System:
    hub: FakeHub
    hub_address: tuple[str, int]
    links: LinkServer
    engine: Engine
    receiver: Receiver
    limits: SessionLimits
    make_link: LinkFactory | None
    visuals: dict[str, list[VisualItem]] = field(default_factory=dict)
    ranks: dict[int, EncodeRank] = field(default_factory=dict)
    workers: dict[int, CountingWorker] = field(default_factory=dict)
    bodies: dict[int, asyncio.Task[int]] = field(default_factory=dict)

    async def start_encode_rank(self, rank=0, *, fingerprint=FINGERPRINT, options=ONE_BY_ONE, joins=False) -> Any:
        """Its `run`; linked when this returns, unless its fingerprint is another. One that joins is told its number."""
        number, pid = None if joins else rank, os.getpid()
        hello = RankHello(token=TOKEN, role="encode", rank=number, pid=pid, fingerprint=fingerprint)
        worker = self.workers[rank] = CountingWorker(MODEL, PROCESSOR, CONFIG)
        times: dict[str, Any] = {"limits": self.limits, "reconnect_s": 5}
        body = EncodeRank(worker, hello, self.hub_address, make_link=self.make_link, options=options, **times)
        self.ranks[rank] = body
        self.bodies[rank] = asyncio.create_task(body.run())
        if fingerprint is FINGERPRINT:
            await until(lambda: self.link_of(rank) and rank in self.hub.ranks)
        return self.bodies[rank]

    async def kill(self, rank: int = 0) -> None:
        """Its end, without a goodbye; its links are down when this returns."""
        body = self.ranks.pop(rank)
        del self.hub.ranks[rank]
        for link in body.server._links._links.values():
            link.control.abort()
        task = self.bodies.pop(rank)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: rank not in self.links.sessions.links)

    def link_of(self, rank: int = 0) -> Any:
        """(epoch, the encode side's connection, the language side's); None while there is no link."""
        link = self.ranks[rank].server._links._links.get(LANGUAGE_RANK)
        other = self.links._links.get((rank, link.epoch)) if link is not None else None
        if link is None or other is None or rank not in self.links.sessions.links:
            return None
        return link.epoch, link.control, other.control

    async def cut(self, end: str, rank: int = 0) -> int:
        """Abort the link's control connection at this end, and wait until the language side knows; its epoch."""
        await until(lambda: self.link_of(rank))
        epoch, *ends = self.link_of(rank)
        ends[end == "language"].abort()
        while (link := self.links.sessions.links.get(rank)) is not None and link.epoch == epoch:
            await asyncio.sleep(0)
        return epoch

    def submit(self, request_id: str, *images: bytes, timeout_s: float = 60, encode_rank: int = 0) -> None:
        """What the router and the engine do with a new request."""
        self.visuals[request_id] = [describe(data) for data in images]
        for visual, data in zip(self.visuals[request_id], images, strict=True):
            self.hub.media.setdefault(visual.digest, data)
        lacking = list(range(len(images)))
        deadline = time.monotonic() + timeout_s
        self.links.handle(Expect(request_id, self.visuals[request_id], lacking, deadline))
        for item in lacking:
            self.assign(request_id, item, encode_rank=encode_rank)

    def assign(self, request_id: str, item: int = 0, attempt: int = 1, *, encode_rank: int = 0) -> None:
        """What the router says of an item."""
        self.links.handle(Assign(request_id=request_id, item=item, attempt=attempt, encode_rank=encode_rank))

    def retry(self, lost: ItemLost) -> None:
        """For `engine.on_loss`: the router tries again."""
        self.engine.lost.append(lost)
        self.assign(lost.request_id, lost.item, lost.attempt + 1)

    def cancel(self, request_id: str) -> None:
        self.links.handle(Cancel(request_id=request_id))

    async def check(self, request_id: str, *images: bytes, timeout: float = 20) -> list[ItemTimings]:
        """All items of a request arrive with the right bits; then it is over. What each took."""
        last = []
        for item, data in enumerate(images):
            rows, delivery = await self.engine.item(request_id, item, timeout)
            assert torch.equal(rows, expect_rows(data)), f"{request_id}/{item} has other rows"
            last.append(delivery.timings)
        self.links.handle(Cancel(request_id=request_id))
        return last

    def leftovers(self) -> dict[str, Any]:
        """Whatever either side still holds of any request."""
        links, allocator = self.links, self.links.sessions.allocator
        tables: dict[str, Any] = {
            "requests": links.sessions.requests,
            "pending": links.sessions.pending,
            "recalled": links.sessions.recalled,
            "receiver": self.receiver._items,
            "pools": [p for p, total in allocator.totals.items() if allocator.counts(p) != (total, 0, 0)],
            "held": self.engine.held,
        }
        for rank, body in self.ranks.items():
            server = body.server
            mine = {"sessions": server.sessions.items, "tasks": server._tasks}
            mine |= {"encoded": server._encoded, "busy": not server.sessions.is_idle}
            tables |= {f"{name} of encode rank {rank}": table for name, table in mine.items()}
        return {name: list(table) if isinstance(table, dict) else table for name, table in tables.items() if table}


@asynccontextmanager
async def running(
    *,
    blocks: int = 64,
    deepstack_blocks: int | None = None,
    limits: SessionLimits = LIMITS,
    kind: str = "gloo",
    **flaws: Any,
) -> AsyncIterator[System]:
    """A language rank's link server without an encode rank. `kind`: gloo, in-process, or gloo with each side making
    its own links ("own"). `flaws` are those of `FlakyLinks`."""
    hub = FakeHub()
    server = await asyncio.start_server(hub.accept, "127.0.0.1", 0)
    deepstack_rows = None if deepstack_blocks is None else deepstack_blocks * BLOCK
    buffers = MultimodalDataBuffers(
        CONFIG, num_rows=blocks * BLOCK, num_deepstack_rows=deepstack_rows, block_size=BLOCK
    )
    receiver = Receiver(buffers, CONFIG)
    make = in_process_links() if kind == "in-process" else process_group_links("127.0.0.1")
    make_link = None if kind == "own" else FlakyLinks(make, **flaws)
    links = LinkServer(
        receiver,
        fingerprint=FINGERPRINT,
        token=TOKEN,
        language_rank=LANGUAGE_RANK,
        make_link=make_link,
        limits=limits,
    )
    engine = Engine(links)
    host, port = await links.serve()
    hub.peers = Peers(language_ranks=[(LANGUAGE_RANK, host, port)])
    system = System(hub, server.sockets[0].getsockname()[:2], links, engine, receiver, limits, make_link)
    try:
        yield system
        await until(lambda: not system.leftovers(), 12, system.leftovers)
    finally:
        for worker in system.workers.values():
            worker.gate.set()
        for task in system.bodies.values():
            task.cancel()
        await asyncio.gather(*system.bodies.values(), return_exceptions=True)
        await links.close()
        server.close()


def is_linked(message: Message) -> bool:
    return isinstance(message, LinksUp) and message.language_ranks == [LANGUAGE_RANK]

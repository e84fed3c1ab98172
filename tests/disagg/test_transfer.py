"""An encode rank and a language rank's link server, whole, over real sockets and 2-rank Gloo groups on one loop."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from PIL import Image

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.disagg.buffers import MultimodalDataBuffers
from qwen3vl_disagg.disagg.control import Connection
from qwen3vl_disagg.disagg.encode_rank import EXIT_REFUSED, EncodeRank
from qwen3vl_disagg.disagg.encode_worker import EncodeWorker
from qwen3vl_disagg.disagg.fingerprint import link_fingerprint
from qwen3vl_disagg.disagg.link_server import LinkServer
from qwen3vl_disagg.disagg.links import in_process_links
from qwen3vl_disagg.disagg.messages import (
    Blob,
    Cancel,
    Decoded,
    EncodeItem,
    ItemFailed,
    LinksUp,
    Message,
    Peers,
    Pull,
    RankHello,
    Stop,
    Welcome,
)
from qwen3vl_disagg.disagg.receiver import LanguageReceiver
from qwen3vl_disagg.disagg.store import host_store
from qwen3vl_disagg.processing import ImageProcessor
from tests.support.random_model import IMAGE_TOKEN, random_vision_model, small_config

CONFIG = small_config()
TOKEN = "secret"
MODEL = random_vision_model(CONFIG, seed=1)
PROCESSOR = ImageProcessor(CONFIG.vision, min_pixels=32 * 32, max_pixels=256 * 256)
FINGERPRINT = link_fingerprint(
    CONFIG, {"vision_weights": "a digest"}, dtype=torch.float32, block_size=4, processor=PROCESSOR
)


def make_image(seed: int, size: tuple[int, int]) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def describe(data: bytes) -> VisualItem:
    info = PROCESSOR.probe(data)
    grid = PROCESSOR.grid(info.width, info.height)
    digest = hashlib.sha256(data).hexdigest()
    rows = grid[1] * grid[2] // 4
    return VisualItem(
        modality="image", digest=digest, num_bytes=len(data), grid=grid, num_rows=rows, offset=0, param="messages[0]"
    )


@dataclass
class FakeHub:
    """The frontend's side of the hub, as far as an encode rank sees it."""

    media: dict[str, bytes] = field(default_factory=dict)
    said: list[Message] = field(default_factory=list)
    ranks: list[Connection] = field(default_factory=list)
    peers: Peers | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection.hub(reader, writer)
        hello = await connection.receive(timeout=5)
        if isinstance(hello, Pull):
            data = self.media.get(hello.digest)
            await connection.send(Blob(num_bytes=-1 if data is None else len(data)))
            if data is not None:
                await connection.send_bytes(data, 5)
            await connection.close()
            return
        await connection.send(Welcome())
        await connection.send(self.peers)
        self.ranks.append(connection)
        try:
            while True:
                self.said.append(await connection.receive())
                self.news.set()
        except Exception:
            await connection.close()

    async def until(self, found: Any, timeout: float = 15) -> Any:
        """The first message, past or to come, that `found` accepts."""
        async with asyncio.timeout(timeout):
            while True:
                for message in self.said:
                    if found(message):
                        return message
                self.news.clear()
                await self.news.wait()


@dataclass
class System:
    hub: FakeHub
    links: LinkServer
    receiver: LanguageReceiver
    items: asyncio.Queue
    lost: asyncio.Queue
    start_encode_rank: Any

    def ask(self, data: bytes, request_id: str = "r", item: int = 0, attempt: int = 1) -> VisualItem:
        """What the router does: tell both sides of an item."""
        visual = describe(data)
        self.hub.media.setdefault(visual.digest, data)
        self.links.request(request_id, item, attempt, visual, 0)
        self.hub.ranks[-1].post(
            EncodeItem(
                request_id=request_id,
                item=item,
                attempt=attempt,
                language_rank=1,
                visual=visual,
                visual_token_id=IMAGE_TOKEN,
                timeout_s=20,
            )
        )
        return visual


@asynccontextmanager
async def running(*, num_rows: int = 256, fingerprint: Any = FINGERPRINT, in_process: bool = False):
    hub = FakeHub()
    server = await asyncio.start_server(hub.accept, "127.0.0.1", 0)
    hub_address = server.sockets[0].getsockname()[:2]
    store, store_address = host_store("127.0.0.1")
    buffers = MultimodalDataBuffers(CONFIG, num_rows=num_rows, block_size=4)
    receiver = LanguageReceiver(buffers, CONFIG)
    shared = in_process_links()
    links = LinkServer(
        receiver,
        fingerprint=FINGERPRINT,
        token=TOKEN,
        language_rank=1,
        make_link=shared if in_process else None,
    )
    items, lost = asyncio.Queue(), asyncio.Queue()
    links.on_item = lambda *event: items.put_nowait(event)
    links.on_lost = lambda *event: lost.put_nowait(event)
    links.use_store(store)
    host, port = await links.serve()
    hub.peers = Peers(store_address=store_address, language_ranks=[(1, host, port)])
    tasks = []

    async def start_encode_rank() -> asyncio.Task:
        hello = RankHello(token=TOKEN, role="encode", rank=0, pid=os.getpid(), fingerprint=fingerprint)
        worker = EncodeWorker(MODEL, PROCESSOR, CONFIG)
        rank = EncodeRank(worker, hello, hub_address, make_link=shared if in_process else None)
        tasks.append(asyncio.create_task(rank.run()))
        return tasks[-1]

    try:
        yield System(hub, links, receiver, items, lost, start_encode_rank)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await links.close()
        server.close()


def is_linked(message: Message) -> bool:
    return isinstance(message, LinksUp) and message.language_ranks == [1]


def expect_rows(data: bytes) -> torch.Tensor:
    patches, grid = PROCESSOR.pixels(data)
    with torch.inference_mode():
        return MODEL.get_image_feature(patches, [grid])


@pytest.mark.parametrize("in_process", [False, True])
def test_rows_arrive_bit_equal_and_leave_the_buffers(in_process):
    async def scenario():
        async with running(in_process=in_process) as system:
            await system.start_encode_rank()
            await system.hub.until(is_linked)
            images = [make_image(i, size) for i, size in enumerate([(64, 64), (128, 96), (32, 160)])]
            for i, data in enumerate(images):
                system.ask(data, item=i)
            got = {}
            for _ in images:
                _, item, header, received, _, num_bytes = await asyncio.wait_for(system.items.get(), 15)
                rows = len(received.main)
                # h = 32 float32, fill id, position; 2 levels; 8 aux words.
                assert num_bytes == rows * (32 * 4 + 4 + 12 + 2 * 32 * 4) + 64
                assert header.total_rows == rows
                got[item] = received
            for i, data in enumerate(images):
                assert torch.equal(torch.cat([got[i].main, got[i].deepstack], dim=1), expect_rows(data))
            assert any(isinstance(message, Decoded) for message in system.hub.said)
            assert system.receiver.is_idle

    asyncio.run(scenario())


def test_items_wait_for_room_in_order():
    async def scenario():
        async with running(num_rows=8) as system:  # one image of 4 rows fits twice
            await system.start_encode_rank()
            await system.hub.until(is_linked)
            for i in range(7):
                system.ask(make_image(i, (64, 64)), request_id=f"r{i}")
            for _ in range(7):
                request_id, _, _, received, _, _ = await asyncio.wait_for(system.items.get(), 15)
                index = int(request_id[1:])
                assert torch.equal(received.main, expect_rows(make_image(index, (64, 64)))[:, :32])
            assert system.receiver.is_idle

    asyncio.run(scenario())


def test_a_damaged_image_is_the_clients_fault():
    async def scenario():
        async with running() as system:
            await system.start_encode_rank()
            await system.hub.until(is_linked)
            good = make_image(0, (64, 64))
            visual = system.ask(good[: len(good) // 2])
            failed = await system.hub.until(lambda m: isinstance(m, ItemFailed))
            assert (failed.kind, failed.item, failed.attempt) == ("input", 0, 1)
            assert visual.digest not in failed.message
            system.links.cancel("r")
            assert system.receiver.is_idle
            system.ask(good, request_id="next")
            assert (await asyncio.wait_for(system.items.get(), 15))[0] == "next"

    asyncio.run(scenario())


def test_bytes_that_the_store_lost_fail_the_item_alone():
    async def scenario():
        async with running() as system:
            await system.start_encode_rank()
            await system.hub.until(is_linked)
            data = make_image(0, (64, 64))
            system.hub.media[describe(data).digest] = data[:-1] + b"\0"
            system.ask(data)
            failed = await system.hub.until(lambda m: isinstance(m, ItemFailed))
            assert failed.kind == "failed"
            assert "digest" in failed.message

    asyncio.run(scenario())


def test_cancel_at_any_time_leaves_nothing_behind():
    async def scenario():
        async with running() as system:
            await system.start_encode_rank()
            await system.hub.until(is_linked)
            for i in range(12):
                system.ask(make_image(i, (96, 96)), request_id=f"r{i}")
                await asyncio.sleep(0.002 * i)
                system.links.cancel(f"r{i}")
                system.hub.ranks[-1].post(Cancel(request_id=f"r{i}"))
            system.ask(make_image(99, (64, 64)), request_id="last")
            while (event := await asyncio.wait_for(system.items.get(), 20))[0] != "last":
                assert event[0].startswith("r")
            assert torch.equal(event[3].main, expect_rows(make_image(99, (64, 64)))[:, :32])
            for _ in range(100):
                if system.receiver.is_idle:
                    return
                await asyncio.sleep(0.05)
            raise AssertionError("blocks are still owned")

    asyncio.run(scenario())


def test_a_dead_encode_rank_loses_its_items_and_comes_back_under_a_new_epoch():
    async def scenario():
        async with running() as system:
            first = await system.start_encode_rank()
            await system.hub.until(is_linked)
            visual = describe(make_image(0, (64, 64)))
            system.links.request("r", 0, 1, visual, 0)  # granted, never encoded
            first.cancel()
            assert (await asyncio.wait_for(system.lost.get(), 10))[:3] == ("r", 0, 1)
            assert system.receiver.is_idle
            system.links.request("r", 0, 2, visual, 0)
            assert (await asyncio.wait_for(system.lost.get(), 10))[:3] == ("r", 0, 2)
            system.hub.said.clear()
            await system.start_encode_rank()
            await system.hub.until(is_linked)
            system.ask(make_image(0, (64, 64)), attempt=3)
            event = await asyncio.wait_for(system.items.get(), 15)
            assert event[2].attempt == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("field", sorted(FINGERPRINT))
def test_a_rank_that_does_not_fit_is_refused_by_name(field, capsys):
    async def scenario():
        async with running(fingerprint={**FINGERPRINT, field: "other"}) as system:
            task = await system.start_encode_rank()
            assert await asyncio.wait_for(task, 15) == EXIT_REFUSED

    asyncio.run(scenario())
    out = capsys.readouterr().out
    assert f"handshake refused: {field}: expected" in out
    assert FINGERPRINT[field] in out
    assert "'other'" in out


def test_a_wrong_token_is_refused_and_others_go_on():
    async def scenario():
        async with running() as system:
            host, port = system.hub.peers.language_ranks[0][1:]
            for garbage in (b"", b"\0\0\0\4junk", b"\xff" * 8, b"GET / HTTP/1.1\r\n\r\n"):
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(garbage)
                writer.write_eof()
                await asyncio.wait_for(reader.read(), 10)
                writer.close()
            await system.start_encode_rank()
            await system.hub.until(is_linked)

    asyncio.run(scenario())


def test_stop_ends_the_rank_with_status_zero():
    async def scenario():
        async with running() as system:
            task = await system.start_encode_rank()
            await system.hub.until(is_linked)
            system.hub.ranks[-1].post(Stop())
            assert await asyncio.wait_for(task, 10) == 0

    asyncio.run(scenario())

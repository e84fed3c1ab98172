"""Media on its way to an encode rank: what moves may take its time, what stands still does not."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from qwen3vl_disagg.cluster import media_store
from qwen3vl_disagg.cluster.media_store import MediaStore, pull_media
from qwen3vl_disagg.core.errors import TransferError
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.protocol.messages import Blob, HubMessage, Pull
from qwen3vl_disagg.transport.control import MAX_HUB_FRAME, Connection
from tests.support.link_peers import VISUAL

DATA = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(DATA).hexdigest()
STILL_S = 0.6


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(media_store, "STILL_S", STILL_S)
    monkeypatch.setattr(media_store, "HEARTBEAT_S", STILL_S / 4)
    for method in (Connection.send_bytes, Connection.receive_bytes):
        monkeypatch.setattr(method, "__defaults__", (STILL_S,))


def pulled_from(answer: Callable[[Connection], Awaitable[None]]) -> bytes:
    """One pull, of a hub that answers so."""

    async def scenario() -> bytes:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = Connection(reader, writer, messages=HubMessage, max_frame=MAX_HUB_FRAME)
            try:
                await connection.receive(20)
                await answer(connection)
            finally:
                await connection.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, asyncio.timeout(60):
            return await pull_media(server.sockets[0].getsockname(), "token", DIGEST, len(DATA))

    return asyncio.run(scenario())


def full_store() -> tuple[MediaStore, VisualItem]:
    store, item = MediaStore(), msgspec.structs.replace(VISUAL, digest=DIGEST, num_bytes=len(DATA))
    store.hold([item], [DATA])
    return store, item


def pull_of(item: VisualItem) -> Pull:
    return Pull(token="token", digest=item.digest)


def test_a_pull_that_moves_takes_as_long_as_it_does():
    async def trickle(connection):
        await connection.send(Blob(num_bytes=len(DATA)))
        for start in range(0, len(DATA), len(DATA) // 8):
            await connection.send_bytes(DATA[start : start + len(DATA) // 8])
            await asyncio.sleep(STILL_S / 3)

    assert pulled_from(trickle) == DATA


@pytest.mark.parametrize("said", [False, True])
def test_a_pull_that_stands_still_ends(said):
    async def vanish(connection):
        if said:
            await connection.send(Blob(num_bytes=len(DATA)))
            await connection.send_bytes(DATA[:1000])
        await asyncio.sleep(60)

    started = time.monotonic()
    with pytest.raises(TransferError, match=r"1000 of \d+ bytes, and no more" if said else "no message within"):
        pulled_from(vanish)
    assert time.monotonic() - started < 20


def test_a_pull_that_waits_for_others_is_told_that_it_does():
    store, item = full_store()

    async def queue(connection):
        for _ in range(media_store.MAX_PULLS):
            await store._pulls.acquire()
        asyncio.get_running_loop().call_later(3 * STILL_S, store._pulls.release)
        await store.answer(connection, pull_of(item))

    assert pulled_from(queue) == DATA
    assert store._pulls.locked() is False, "the place was given back"


def test_who_takes_no_bytes_gives_its_place_back():
    store, item = full_store()
    store._entries[DIGEST].data = bytes(64 * 2**20)

    async def scenario():
        gone = asyncio.Event()

        async def serve(reader, writer):
            connection = Connection(reader, writer, messages=HubMessage, max_frame=MAX_HUB_FRAME)
            with pytest.raises(TransferError, match="did not read"):
                await store.answer(connection, pull_of(item))
            gone.set()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server, asyncio.timeout(20):
            _reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=1024)
            await gone.wait()
            writer.close()

    asyncio.run(scenario())
    assert store._pulls._value == media_store.MAX_PULLS

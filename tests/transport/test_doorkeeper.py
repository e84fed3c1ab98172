"""What peers cost that have not shown the token, at every listener; and what pullers cost that do not read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_disagg.language.link_server import LinkServer
from qwen3vl_disagg.parallel.lockstep import Lockstep, LockstepMessage, PaceLimits, PeerHello, PeerWelcome
from qwen3vl_disagg.parallel.lockstep_link import LockstepServer
from qwen3vl_disagg.protocol.messages import (
    FindStore,
    Heartbeat,
    HubMessage,
    LinkAccept,
    LinkHello,
    LinkMessage,
    LinksUp,
    Message,
    Pull,
    RankHello,
    Refused,
    StoreAt,
)
from qwen3vl_disagg.transport import control, doorkeeper
from qwen3vl_disagg.transport.control import (
    MAX_HUB_FRAME,
    Address,
    Connection,
    ConnectionLost,
    connect,
    connect_hub,
    encode_frame,
)
from qwen3vl_disagg.transport.doorkeeper import MAX_HELLO_FRAME, MAX_STRANGERS, Door, Doorkeeper
from tests.support.fake_ranks import FINGERPRINT, TOKEN, WAIT_S, System, in_loop
from tests.support.random_model import small_config
from tests.support.transfer import make_receiver

MIB = 2**20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def listen() -> tuple[socket.socket, Address]:
    sock = socket.create_server(("127.0.0.1", 0))
    return sock, sock.getsockname()[:2]


@asynccontextmanager
async def door() -> AsyncIterator[tuple[Doorkeeper, Address, asyncio.Queue[tuple[Message, Connection]]]]:
    """A doorkeeper; those whom it let in stay until the end of the block."""
    let_in = asyncio.Queue[tuple[Message, Connection]]()
    over = asyncio.Event()

    async def serve(first: Message, connection: Connection) -> None:
        let_in.put_nowait((first, connection))
        await over.wait()

    sock, address = listen()
    keeper = Doorkeeper(sock, serve, token=TOKEN, messages=HubMessage, max_frame=MAX_HUB_FRAME, name="test")
    try:
        yield keeper, address, let_in
    finally:
        over.set()
        keeper.close()
        await keeper.wait_closed()


def strangers(address: Address, count: int) -> list[socket.socket]:
    """They announce the largest frame there is, and send of it as much as goes."""
    made = []
    for _ in range(count):
        sock = socket.create_connection(address, timeout=WAIT_S)
        sock.setblocking(False)
        made.append(sock)
    return made


def push(peers: list[socket.socket], data: bytes) -> None:
    for peer in peers:
        try:
            peer.send(data)
        except OSError:
            continue  # full, or closed at the other end


async def is_closed(sock: socket.socket) -> None:
    """Wait for the end of the stream, or a reset."""
    async with asyncio.timeout(WAIT_S):
        try:
            while await asyncio.get_running_loop().sock_recv(sock, 4096):
                continue
        except ConnectionError:
            return


@pytest.mark.parametrize("announced", [MAX_HELLO_FRAME, MAX_HUB_FRAME])
@pytest.mark.parametrize("count", [60, 1000])
@in_loop
async def test_strangers_cost_next_to_nothing(count, announced):
    """However much they send; and who shows the token is let in beside them."""
    data = announced.to_bytes(4, "big") + bytes(128 * 1024)
    data = data if announced > MAX_HELLO_FRAME else data[:announced]  # one byte less than a whole frame
    async with door() as (keeper, address, let_in):
        before, most = resident(), 0
        peers: list[socket.socket] = []
        while len(peers) < count:
            peers += strangers(address, 20)
            push(peers[-20:], data)
            await asyncio.sleep(0.002)
            assert keeper.num_strangers <= MAX_STRANGERS
            most = max(most, resident())
        grown = most - before
        print(f"{count} strangers: {grown / MIB:.1f} MiB")
        friend = await connect_hub(address, deadline_s=WAIT_S)
        await friend.send(FindStore(token=TOKEN))
        async with asyncio.timeout(2.0):
            first, _ = await let_in.get()
        assert isinstance(first, FindStore)
        assert grown < 16 * MIB, f"{grown / MIB:.1f} MiB for {count} strangers"
        await friend.close()
        for peer in peers:
            peer.close()


@in_loop
async def test_who_waits_longest_without_a_hello_goes_when_too_many_do():
    async with door() as (keeper, address, _):
        first = strangers(address, MAX_STRANGERS)
        async with asyncio.timeout(WAIT_S):
            while keeper.num_strangers < MAX_STRANGERS:
                await asyncio.sleep(0.005)
        late = strangers(address, 1)
        await is_closed(first[0])
        assert keeper.num_strangers <= MAX_STRANGERS
        for peer in (*first, *late):
            peer.close()


@in_loop
async def test_a_hello_has_a_deadline_also_when_it_trickles(monkeypatch):
    monkeypatch.setattr(doorkeeper, "HELLO_S", 0.3)
    hello = encode_frame(FindStore(token=TOKEN), MAX_HUB_FRAME)
    async with door() as (keeper, address, let_in):
        silent, slow = strangers(address, 2)
        for byte in hello[:-1]:
            push([slow], bytes([byte]))
            await asyncio.sleep(0.4 / len(hello))
        await is_closed(silent)
        await is_closed(slow)
        assert (keeper.num_strangers, let_in.qsize()) == (0, 0)
        silent.close()
        slow.close()


@in_loop
async def test_a_hello_in_pieces_is_one_and_large_frames_come_after_it():
    hello = encode_frame(FindStore(token=TOKEN), MAX_HUB_FRAME)
    async with door() as (_, address, let_in):
        [peer] = strangers(address, 1)
        for byte in hello:
            push([peer], bytes([byte]))
            await asyncio.sleep(0.001)
        async with asyncio.timeout(WAIT_S):
            _, connection = await let_in.get()
        large = LinksUp(language_ranks=list(range(100_000)))
        await asyncio.get_running_loop().sock_sendall(peer, encode_frame(large, MAX_HUB_FRAME))
        assert await connection.receive(WAIT_S) == large
        peer.close()


# ---- every listener ----


@asynccontextmanager
async def hub() -> AsyncIterator[Address]:
    async with System(2, 1) as system:
        yield system.address


@asynccontextmanager
async def links() -> AsyncIterator[Address]:
    server = LinkServer(make_receiver(small_config()), fingerprint=FINGERPRINT, token=TOKEN, language_rank=1)
    yield await server.serve()
    await server.close()


@asynccontextmanager
async def lockstep() -> AsyncIterator[Address]:
    server = LockstepServer(Lockstep(2, PaceLimits(64, 4096), lambda rows, num_rows: "gather"))
    sock, address = listen()
    door = Door(sock, server.take_in, token=TOKEN, messages=LockstepMessage, name="lockstep")
    yield address
    await server.close()
    door.close()


LISTENERS: list[tuple[Any, Any, list[Message]]] = [
    (
        hub,
        HubMessage,
        [
            RankHello(token="x", role="encode", rank=0, pid=1, fingerprint=FINGERPRINT),
            Pull(token="x", digest="0" * 64),
            FindStore(token=""),
            StoreAt(token="x" * 5000, address=("127.0.0.1", 1)),
        ],
    ),
    (links, LinkMessage, [LinkHello(token="x", encode_rank=0, pid=1, fingerprint=FINGERPRINT)]),
    (lockstep, LockstepMessage, [PeerHello(token="x", rank=1)]),
]
IDS = [listener.__name__ for listener, *_ in LISTENERS]


@pytest.mark.parametrize(("listener", "messages", "hellos"), LISTENERS, ids=IDS)
@in_loop
async def test_another_token_is_told_and_nothing_else_is(listener, messages, hellos):
    async with listener() as address:
        for hello in (*hellos, Heartbeat()):
            peer = await connect(address, deadline_s=WAIT_S, messages=messages | Refused, max_frame=MAX_HUB_FRAME)
            await peer.send(hello)
            refused = await peer.receive(WAIT_S)
            assert (refused.field, refused.got) == ("token", "another")
            with pytest.raises(ConnectionLost):
                await peer.receive(WAIT_S)
            await peer.close()


@pytest.mark.parametrize(("listener", "messages", "hellos"), LISTENERS, ids=IDS)
@in_loop
async def test_a_first_frame_of_more_than_a_few_kib_is_not_waited_for(monkeypatch, listener, messages, hellos):
    monkeypatch.setattr(doorkeeper, "HELLO_S", 100 * WAIT_S)
    async with listener() as address:
        loop = asyncio.get_running_loop()
        for data in (
            (MAX_HELLO_FRAME + 1).to_bytes(4, "big"),
            MAX_HUB_FRAME.to_bytes(4, "big") + bytes(1000),
            b"\xff" * 64,
            b"GET / HTTP/1.1\r\n\r\n",
            (3).to_bytes(4, "big") + b"abc",
            bytes(4),
        ):
            [peer] = strangers(address, 1)
            await loop.sock_sendall(peer, data)
            await is_closed(peer)
            peer.close()


@pytest.mark.parametrize("flood", [60, 300])
@in_loop
async def test_a_language_rank_lets_encode_ranks_in_beside_strangers(flood):
    async with AsyncExitStack() as stack:
        server = LinkServer(make_receiver(small_config()), fingerprint=FINGERPRINT, token=TOKEN, language_rank=1)
        address = await server.serve()
        stack.push_async_callback(server.close)
        noise = strangers(address, flood)
        push(noise, MAX_HELLO_FRAME.to_bytes(4, "big") + bytes(4000))
        peer = await control.connect_link(address, deadline_s=WAIT_S)
        await peer.send(LinkHello(token=TOKEN, encode_rank=0, pid=1, fingerprint=FINGERPRINT))
        assert isinstance(await peer.receive(WAIT_S), LinkAccept)
        await peer.close()
        for sock in noise:
            sock.close()


# ---- bytes on their way to pullers ----


@in_loop
async def test_bytes_for_a_peer_that_does_not_read_wait_where_they_are():
    """A slice of them is on its way, not 48 MiB; and what is read is whole."""
    data = bytes(range(256)) * (48 * MIB // 256)
    async with door() as (_, address, let_in):
        peer = await connect_hub(address, deadline_s=WAIT_S)
        await peer.send(FindStore(token=TOKEN))
        _, connection = await let_in.get()
        before = resident()
        sending = asyncio.create_task(connection.send_bytes(data, WAIT_S))
        await asyncio.sleep(0.1)
        assert not sending.done()
        assert connection._writer.transport.get_write_buffer_size() <= 512 * 1024
        assert resident() - before < 8 * MIB
        assert await peer.receive_bytes(len(data), WAIT_S) == data
        await sending
        await peer.close()


@in_loop
async def test_a_peer_that_never_reads_is_given_up_at_the_deadline():
    async with door() as (_, address, let_in):
        peer = await connect_hub(address, deadline_s=WAIT_S)
        await peer.send(FindStore(token=TOKEN))
        _, connection = await let_in.get()
        with pytest.raises(ConnectionLost, match="did not read"):
            await connection.send_bytes(bytes(48 * MIB), 0.2)
        await peer.close()


@in_loop
async def test_lockstep_takes_ranks_in_beside_strangers():
    async with lockstep() as address:
        noise = strangers(address, 200)
        peer = await connect(address, deadline_s=WAIT_S, messages=LockstepMessage, max_frame=64 * 1024)
        await peer.send(PeerHello(token=TOKEN, rank=1))
        assert isinstance(await peer.receive(WAIT_S), PeerWelcome)
        await peer.close()
        for sock in noise:
            sock.close()

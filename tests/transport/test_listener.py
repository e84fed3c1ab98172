"""Listening with no file descriptor left: it rests, says so once, and goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import time

import pytest

from qwen3vl_disagg.cluster.slots import run_worker
from qwen3vl_disagg.core.host import ENOUGH, descriptor_limit, raise_descriptor_limit
from qwen3vl_disagg.protocol.messages import HubMessage, Message
from qwen3vl_disagg.transport.control import MAX_HUB_FRAME, Connection
from qwen3vl_disagg.transport.doorkeeper import Doorkeeper
from qwen3vl_disagg.transport.listener import Listener
from tests.support.fake_ranks import in_loop

SOFT, HARD = resource.getrlimit(resource.RLIMIT_NOFILE)


@pytest.fixture
def limits():
    """The test may change the soft limit."""
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, HARD))


class Hello(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.write(b"hello")


async def serve(first: Message, connection: Connection) -> None:
    """Nobody gets so far."""


def listen(kind: str, sock: socket.socket) -> Listener:
    if kind == "http":
        return Listener(sock, Hello, name=kind)
    return Doorkeeper(sock, serve, token="t", messages=HubMessage, max_frame=MAX_HUB_FRAME, name=kind)


@pytest.mark.parametrize("kind", ["hub", "http"])
@in_loop
async def test_no_descriptor_left(limits, caplog, kind):
    loop = asyncio.get_running_loop()
    sock = socket.create_server(("127.0.0.1", 0))
    address = sock.getsockname()
    listener = listen(kind, sock)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 12, HARD))
    clients = []
    with contextlib.suppress(OSError):
        while True:  # the clients have the last ones
            clients.append(socket.socket())
            clients[-1].setblocking(False)
            await loop.sock_connect(clients[-1], address)
    used = time.process_time()
    await asyncio.sleep(1.2)
    assert time.process_time() - used < 0.3
    for client in clients[:-2]:
        client.close()
    async with asyncio.timeout(5):
        await loop.sock_sendall(clients[-2], b"\xff" * 4)  # to the hub: a frame that is too large
        assert await loop.sock_recv(clients[-2], 5) == (b"hello" if kind == "http" else b"")
    listener.close()
    await listener.wait_closed()
    for client in clients:
        client.close()
    await asyncio.sleep(0.1)
    assert caplog.messages == [f"{kind}: cannot accept connections: Too many open files"]


@pytest.mark.parametrize("soft", [SOFT // 2, SOFT // 2 + 1])
def test_a_worker_raises_the_soft_limit(limits, soft):
    """Its children inherit it."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, HARD))
    assert run_worker(lambda world: descriptor_limit()) == min(HARD, ENOUGH) > soft
    assert raise_descriptor_limit() == raise_descriptor_limit() == os.sysconf("SC_OPEN_MAX")

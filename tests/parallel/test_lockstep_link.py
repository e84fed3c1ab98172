"""Lockstep over real sockets: who is let in, plans to everybody, and the end of one as the end of all."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest

from qwen3vl_disagg.core.errors import HandshakeError
from qwen3vl_disagg.parallel.lockstep import Lockstep, LockstepMessage, Outlook, PaceLimits, PeerHello, StepPlan
from qwen3vl_disagg.parallel.lockstep_link import LockstepClient, LockstepServer, PeerLost, say_hello
from qwen3vl_disagg.transport.doorkeeper import Door
from tests.support.fake_ranks import in_loop

LIMITS = PaceLimits(64, 4096)


class Group:
    """The first rank's server, and clients that join it."""

    def __init__(self, server: LockstepServer, address: tuple[str, int]) -> None:
        self.server, self.address = server, address
        self.clients: list[LockstepClient] = []
        self.running: list[asyncio.Task] = []
        self.plans: list[list[StepPlan]] = []

    async def join(self, rank: int, *, token: str = "t") -> LockstepClient:
        line = say_hello(self.address, PeerHello(token=token, rank=rank))
        client = await LockstepClient.join(line, deadline_s=5.0)
        plans: list[StepPlan] = []
        client.on_plan = plans.append
        self.plans.append(plans)
        self.clients.append(client)
        self.running.append(asyncio.create_task(client.run()))
        return client

    async def until(self, condition) -> None:
        async with asyncio.timeout(10.0):
            while not condition():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def group(num_ranks: int):
    """Ranks may come at any time, also those that do not fit."""
    server = LockstepServer(Lockstep(num_ranks, LIMITS, lambda rows, num_rows: "gather"))
    sock = socket.create_server(("127.0.0.1", 0))
    made = Group(server, sock.getsockname()[:2])
    door = Door(sock, server.take_in, token="t", messages=LockstepMessage, name="lockstep")
    try:
        yield made
    finally:
        for client in made.clients:
            await client.close()
        await server.close()
        door.close()
        await door.wait_closed()
        await asyncio.gather(*made.running, return_exceptions=True)


@in_loop
async def test_a_plan_reaches_every_rank():
    async with group(3) as ranks:
        for rank in range(3):
            await ranks.join(rank)
        for client, decode in zip(ranks.clients, (0, 5, 0), strict=True):
            client.report(Outlook(step=1, decode=decode))
        await ranks.until(lambda: all(ranks.plans))
        assert ranks.plans == [[StepPlan(step=1, num_rows=8)]] * 3


@in_loop
async def test_who_does_not_fit_is_told_why_and_nobody_else_is_touched():
    async with group(2) as ranks:
        await ranks.join(0)
        with pytest.raises(HandshakeError, match="token"):
            await ranks.join(1, token="wrong")
        with pytest.raises(HandshakeError, match="rank"):
            await ranks.join(0)
        _, stray = await asyncio.open_connection(*ranks.address)
        stray.write(b"GET / HTTP/1.1\r\n\r\n")
        await ranks.join(1)
        ranks.clients[0].report(Outlook(step=1, decode=1))
        ranks.clients[1].report(Outlook(step=1))
        await ranks.until(lambda: all(ranks.plans))
        stray.close()


@in_loop
async def test_the_end_of_one_is_the_end_of_all():
    async with group(3) as ranks:
        for rank in range(3):
            await ranks.join(rank)
        ranks.clients[1]._connection.abort()
        done, _ = await asyncio.wait(ranks.running, timeout=5.0)
        assert len(done) == 3
        assert all(isinstance(task.exception(), PeerLost) for task in done)


@in_loop
async def test_a_rank_that_died_while_it_loaded_is_noticed_by_all():
    async with group(3) as ranks:
        say_hello(ranks.address, PeerHello(token="t", rank=1)).close()  # it said hello, and no more

        async def join_and_run(rank: int) -> None:
            await ranks.join(rank)
            await asyncio.gather(*ranks.running)

        ends = await asyncio.gather(join_and_run(0), join_and_run(2), return_exceptions=True)
        assert [type(end) for end in ends] == [PeerLost] * 2


@in_loop
async def test_a_first_rank_that_is_gone_is_noticed_at_once():
    sock = socket.create_server(("127.0.0.1", 0))
    address = sock.getsockname()[:2]
    line = say_hello(address, PeerHello(token="t", rank=1))  # the kernel took it in: the first rank still loads
    sock.close()
    with pytest.raises(PeerLost):
        await LockstepClient.join(line, deadline_s=5.0)
    with pytest.raises(PeerLost, match="no connection to the first"):
        say_hello(address, PeerHello(token="t", rank=1))


@in_loop
async def test_ranks_leave_together():
    async with group(2) as ranks:
        for rank in range(2):
            await ranks.join(rank)
        assert not await ranks.clients[0].leave(0.1)
        # Who wants to leave still takes part in the steps of the other.
        ranks.clients[0].report(Outlook(step=1))
        ranks.clients[1].report(Outlook(step=1, decode=1))
        await ranks.until(lambda: all(ranks.plans))
        assert await ranks.clients[1].leave(5.0)
        await asyncio.wait_for(asyncio.gather(*ranks.running), 5.0)

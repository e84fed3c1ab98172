"""An encode rank that joins from outside: it learns its number, keeps it, and leaves when it may."""

from __future__ import annotations

import asyncio

import pytest

from qwen3vl_disagg.core.errors import HubGone
from qwen3vl_disagg.encode import rank as encode_rank
from qwen3vl_disagg.encode.rank import EncodeRank
from qwen3vl_disagg.protocol.messages import HubMessage, Leaving, LinksUp, RankHello, Stop, Welcome
from qwen3vl_disagg.transport.control import MAX_HUB_FRAME, Connection
from tests.support.link_scenarios import (
    CONFIG,
    MODEL,
    PROCESSOR,
    CountingWorker,
    System,
    make_image,
    run,
    running,
    until,
)

NUMBER, JOB = 9, "this job"


async def join(system: System) -> asyncio.Task[int]:
    system.hub.welcome = Welcome(rank=NUMBER, job=JOB)
    return await system.start_encode_rank(NUMBER, joins=True)


def worker() -> CountingWorker:
    return CountingWorker(MODEL, PROCESSOR, CONFIG)


def said(system: System, kind: type) -> int:
    return sum(isinstance(message, kind) for message in system.hub.said)


def test_it_links_under_the_number_it_was_given_and_states_it_to_the_next_frontend():
    async def scenario() -> None:
        async with running() as system:
            await join(system)
            assert list(system.links.sessions.links) == [NUMBER]
            image = make_image(1, (64, 64))
            system.submit("a", image, encode_rank=NUMBER)
            await system.check("a", image)
            await system.hub.ranks.pop(NUMBER).close()  # the frontend dies
            await until(lambda: NUMBER in system.hub.ranks)
            hellos = [message for message in system.hub.said if isinstance(message, RankHello)]
            assert [(hello.rank, hello.job) for hello in hellos] == [(None, ""), (NUMBER, JOB)]
            system.submit("b", image, encode_rank=NUMBER)
            await system.check("b", image)
            assert system.link_of(NUMBER)[0] == 1  # the link has stayed

    run(scenario)


def test_it_finishes_what_it_has_and_goes_when_the_hub_says_so():
    async def scenario() -> None:
        async with running() as system:
            body = await join(system)
            gate = system.workers[NUMBER].gate
            gate.clear()
            image = make_image(2, (128, 128))
            system.submit("a", image, encode_rank=NUMBER)
            await until(lambda: system.ranks[NUMBER].server.sessions.num_in_memory)
            system.ranks[NUMBER].leave()
            system.ranks[NUMBER].leave()
            await until(lambda: said(system, Leaving))
            assert not body.done()
            gate.set()
            await system.check("a", image)
            await system.hub.ranks[NUMBER].send(Stop())
            assert await body == 0
            assert said(system, Leaving) == 1
            await until(lambda: NUMBER not in system.links.sessions.links)

    run(scenario)


def test_it_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(encode_rank, "DRAIN_S", 0.3)

    async def scenario() -> None:
        async with running() as system:
            body = await join(system)
            system.ranks[NUMBER].leave()
            async with asyncio.timeout(5):
                assert await body == 0
            await until(lambda: NUMBER not in system.links.sessions.links)

    run(scenario)


def test_the_next_frontend_hears_that_it_is_leaving():
    async def scenario() -> None:
        async with running() as system:
            body = await join(system)
            system.ranks[NUMBER].leave()
            await until(lambda: said(system, Leaving))
            await system.hub.ranks.pop(NUMBER).close()
            await until(lambda: said(system, Leaving) == 2)
            await system.hub.ranks[NUMBER].send(Stop())
            assert await body == 0

    run(scenario)


def test_without_a_hub_it_leaves_at_once_and_does_not_stay_for_ever():
    async def scenario() -> None:
        hello = RankHello(token="t", role="encode", rank=None, pid=1, fingerprint={})
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()[:2]
        server.close()
        leaving = EncodeRank(worker(), hello, address, join_s=30.0)
        body = asyncio.create_task(leaving.run())
        await asyncio.sleep(0.1)
        leaving.leave()
        async with asyncio.timeout(5):
            assert await body == 0
        with pytest.raises(HubGone, match="no connection"):
            await EncodeRank(worker(), hello, address, join_s=0.3).run()

    run(scenario)


def test_a_hub_that_goes_for_good_ends_it():
    async def scenario() -> None:
        async def accept(reader, writer) -> None:
            hub = Connection(reader, writer, messages=HubMessage, max_frame=MAX_HUB_FRAME)
            await hub.receive()
            await hub.send(Welcome(rank=NUMBER, job=JOB))
            assert isinstance(await hub.receive(), LinksUp)
            server.close()
            await hub.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        hello = RankHello(token="t", role="encode", rank=None, pid=1, fingerprint={})
        address = server.sockets[0].getsockname()[:2]
        with pytest.raises(HubGone):
            await EncodeRank(worker(), hello, address, reconnect_s=0.5).run()

    run(scenario)

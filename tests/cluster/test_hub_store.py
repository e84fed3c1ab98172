"""What is asked at the hub on connections of their own: where the store is, also of the next frontend; the end."""

from __future__ import annotations

import asyncio
import socket

import pytest

from qwen3vl_disagg.cluster.hub import Hub
from qwen3vl_disagg.cluster.hub_client import ask_to_end, find_store, tell_store
from qwen3vl_disagg.cluster.job_memory import JobMemory
from qwen3vl_disagg.core.errors import Dismissed, HandshakeError, TransferError
from qwen3vl_disagg.protocol.messages import Stop
from tests.support.fake_ranks import CONFIG, TOKEN, WAIT_S, System, in_loop

STORE = ("127.0.0.1", 4242)


@in_loop
async def test_who_asks_before_it_is_known_waits_and_who_asks_after_does_not():
    async with System() as system:
        early = [asyncio.create_task(find_store(system.address, TOKEN, deadline_s=WAIT_S)) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in early)
        await tell_store(system.address, TOKEN, STORE, deadline_s=WAIT_S)
        assert await asyncio.gather(*early) == [STORE, STORE]
        assert await find_store(system.address, TOKEN, deadline_s=WAIT_S) == STORE


@in_loop
async def test_a_wrong_token_neither_tells_nor_learns():
    async with System() as system:
        with pytest.raises(HandshakeError, match="token"):
            await tell_store(system.address, "another", ("10.0.0.1", 1), deadline_s=WAIT_S)
        asking = asyncio.create_task(find_store(system.address, TOKEN, deadline_s=WAIT_S))
        with pytest.raises(HandshakeError, match="token"):
            await find_store(system.address, "another", deadline_s=WAIT_S)
        await asyncio.sleep(0.1)
        assert not asking.done()  # nothing was learned
        await tell_store(system.address, TOKEN, STORE, deadline_s=WAIT_S)
        assert await asking == STORE


@in_loop
async def test_a_store_that_nobody_names_costs_the_deadline():
    async with System() as system:
        with pytest.raises(TransferError, match="within"):
            await find_store(system.address, TOKEN, deadline_s=0.3)


@pytest.mark.parametrize("address", [("", 1), ("h", 0), ("h", 1 << 16), ("h" * 256, 1)])
@in_loop
async def test_what_cannot_be_an_address_is_refused(address):
    async with System() as system:
        with pytest.raises(HandshakeError, match="store_address"):
            await tell_store(system.address, TOKEN, address, deadline_s=WAIT_S)


@in_loop
async def test_a_job_that_goes_down_sends_the_asker_home():
    async with System() as system:
        asking = asyncio.create_task(find_store(system.address, TOKEN, deadline_s=WAIT_S))
        await asyncio.sleep(0.1)
        await system.hub.close(0.05)
        with pytest.raises(Dismissed):
            await asking


@in_loop
async def test_the_next_frontend_still_knows():
    memory, sock = JobMemory(), socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    address = sock.getsockname()[:2]
    asking = asyncio.create_task(find_store(address, TOKEN, deadline_s=WAIT_S))  # before there is a frontend
    first = System(memory=memory)
    await first.hub.serve(sock.dup())
    await asyncio.sleep(0.1)
    assert not asking.done()
    await tell_store(address, TOKEN, STORE, deadline_s=WAIT_S)
    assert await asking == STORE
    await first.hub.close(0.05)
    second = Hub(CONFIG, first.layout, TOKEN, memory=memory)
    await second.serve(sock)
    assert await find_store(address, TOKEN, deadline_s=WAIT_S) == STORE
    await second.close(0.05)


@in_loop
async def test_a_node_that_is_asked_to_end_asks_the_job_to():
    async with System() as system:
        await asyncio.to_thread(ask_to_end, system.address, "another")
        await asyncio.sleep(0.1)
        assert not system.hub.end_job.is_set()
        await asyncio.to_thread(ask_to_end, system.address, TOKEN)
        async with asyncio.timeout(WAIT_S):
            await system.hub.end_job.wait()


@pytest.mark.parametrize("is_late", [False, True])
@in_loop
async def test_a_rank_that_has_failed_before_its_hello_is_not_waited_for(is_late):
    """One encode rank of four ranks has never come; the others leave when they are told."""
    async with System() as system:
        ranks = [await system.join("language", rank) for rank in system.layout.language_ranks]
        ranks.append(await system.join("encode", 0))
        closing, loop = None, asyncio.get_running_loop()
        if is_late:
            closing = asyncio.create_task(system.hub.close(WAIT_S))
            await asyncio.sleep(0.3)
        await asyncio.to_thread(ask_to_end, system.address, TOKEN, lost=1)
        await system.hub.end_job.wait()
        started = loop.time()
        closing = closing or asyncio.create_task(system.hub.close(WAIT_S))
        for rank in ranks:
            await rank.expect(Stop)
            assert not closing.done()
            rank.die()
        await closing
        assert loop.time() - started < 3


def test_a_hub_that_is_not_there_is_said_and_no_more(caplog):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = sock.getsockname()[:2]
    ask_to_end(address, TOKEN)
    assert "was not told" in caplog.text

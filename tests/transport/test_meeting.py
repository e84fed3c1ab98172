"""Peers that die while their link is made, when each side waits for the other in a call that cannot be broken off: they
hold nobody up."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest

from qwen3vl_disagg.encode.links import EncodeLinks
from qwen3vl_disagg.protocol.messages import Heartbeat, LinkAccept, LinkHello, LinkMessage, LinkReady
from qwen3vl_disagg.transport.control import MAX_LINK_FRAME, ConnectionLost, connect_link, link_pair
from qwen3vl_disagg.transport.doorkeeper import Doorkeeper
from qwen3vl_disagg.transport.links import Link
from qwen3vl_disagg.transport.sockets import listen
from tests.support.link_peers import FINGERPRINT, language
from tests.support.link_scenarios import TOKEN, run

NUM_DEAD = 40  # more than asyncio's own pool has threads
SOON_S = 2.0


class Stuck:
    """Makes links for the living; of the dead it waits for what does not come until it is let go."""

    def __init__(self, make_link, living: set[int]) -> None:
        self.make_link, self.living = make_link, living
        self.let_go = threading.Event()

    def __call__(self, side: str, encode_rank: int, language_rank: int, epoch: int) -> Link:
        if encode_rank not in self.living:
            self.let_go.wait(20)
            raise ConnectionLost("let go")
        return self.make_link(side, encode_rank, language_rank, epoch)


def test_encode_ranks_that_die_while_their_links_are_made_do_not_keep_others_out():
    async def scenario():
        async with language() as it:
            stuck = it.server._make_link = Stuck(it.make_link, living={0})
            try:
                for rank in range(1, NUM_DEAD):
                    control = await connect_link(it.address, deadline_s=5)
                    await control.send(LinkHello(token=TOKEN, encode_rank=rank, pid=1, fingerprint=FINGERPRINT))
                    assert isinstance(await control.receive(5), LinkAccept)
                    control.abort()
                started = time.monotonic()
                await it.connect(0)
                assert time.monotonic() - started < SOON_S
            finally:
                stuck.let_go.set()

    run(scenario)


def test_a_language_rank_that_dies_while_the_link_is_made_is_dialled_again_at_once():
    async def scenario():
        told, let_go = asyncio.Queue[float](), threading.Event()

        async def serve(hello, control):
            told.put_nowait(time.monotonic())
            await control.send(LinkAccept(epoch=told.qsize(), language_rank=1, store_address=None))
            await asyncio.sleep(0.1)

        def meet(_):
            def make(*_: object) -> Link:
                let_go.wait(20)
                raise ConnectionLost("let go")

            return make

        sock = listen("127.0.0.1")
        door = Doorkeeper(sock, serve, token=TOKEN, messages=LinkMessage, max_frame=MAX_LINK_FRAME, name="links")
        hello = LinkHello(token=TOKEN, encode_rank=0, pid=os.getpid(), fingerprint=FINGERPRINT)

        def nothing(*_: object) -> None:
            return

        links = EncodeLinks(hello, on_up=nothing, on_down=nothing, on_frame=nothing, on_refused=nothing)
        links.connect([(1, *sock.getsockname()[:2])], meet)
        try:
            first = await asyncio.wait_for(told.get(), SOON_S)
            assert await asyncio.wait_for(told.get(), SOON_S) - first < SOON_S
        finally:
            let_go.set()
            await links.close()
            door.close()
            await door.wait_closed()

    run(scenario)


def test_what_came_before_the_end_is_not_lost():
    async def scenario():
        near, far = await link_pair()
        watching = asyncio.create_task(near.lost())
        await far.send(LinkReady())
        await asyncio.sleep(0.05)
        assert not watching.done()
        watching.cancel()
        for _ in range(100):  # are no messages, and not kept
            await far.send(Heartbeat())
        await far.send(LinkAccept(epoch=1, language_rank=2))
        watching = asyncio.create_task(near.lost())
        await asyncio.sleep(0.05)
        far.abort()
        await asyncio.wait_for(watching, SOON_S)
        assert isinstance(await near.receive(), LinkReady)
        assert isinstance(await near.receive(), LinkAccept)
        with pytest.raises(ConnectionLost):
            await near.receive()

    run(scenario)

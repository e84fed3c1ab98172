"""Peers that die or talk nonsense while their link is made, when each side waits for the other in a call that cannot be
broken off: they hold nobody up. Nor does a name server."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen3vl_disagg.encode.links import EncodeLinks
from qwen3vl_disagg.protocol.messages import (
    Heartbeat,
    LinkAccept,
    LinkAddress,
    LinkHello,
    LinkMessage,
    LinkReady,
    Refused,
)
from qwen3vl_disagg.transport.control import (
    MAX_LINK_FRAME,
    Connection,
    ConnectionLost,
    FrameError,
    connect_link,
    link_pair,
)
from qwen3vl_disagg.transport.doorkeeper import Doorkeeper
from qwen3vl_disagg.transport.links import Link, meet, process_group_links
from qwen3vl_disagg.transport.sockets import listen
from tests.support.link_peers import FINGERPRINT, language
from tests.support.link_scenarios import FINGERPRINT as OF_RUNNING
from tests.support.link_scenarios import TOKEN, System, run, running, until

NUM_DEAD = 40  # more than asyncio's own pool has threads
SOON_S = 2.0


class Stuck:
    """Makes links for the living; of the dead it waits for what does not come until it is let go."""

    def __init__(self, make_link, living: set[int]) -> None:
        self.make_link, self.living = make_link, living
        self.let_go = threading.Event()

    def __call__(self, side: str, encode_rank: int, *others: Any) -> Link:
        if encode_rank not in self.living:
            self.let_go.wait(20)
            raise ConnectionLost("let go")
        return self.make_link(side, encode_rank, *others)


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


def test_epochs_go_on_above_those_that_a_peer_had_and_none_can_make_them_useless():
    """A language rank that was started again counts from the beginning."""

    async def scenario():
        async with language() as it:

            async def hello(last_epoch: int) -> Any:
                control = await connect_link(it.address, deadline_s=5)
                said = LinkHello(token=TOKEN, encode_rank=0, pid=1, fingerprint=FINGERPRINT, last_epoch=last_epoch)
                await control.send(said)
                answer = await control.receive(5)
                control.abort()
                return answer

            assert (await hello(7)).epoch == 8
            assert (await hello(0)).epoch == 9
            refused = await hello(2**64 - 1)
            assert (type(refused), refused.field) == (Refused, "last_epoch")
            assert (await hello(0)).epoch == 10

    run(scenario)


def test_a_language_rank_that_dies_while_the_link_is_made_is_dialled_again_at_once():
    async def scenario():
        told, let_go = asyncio.Queue[float](), threading.Event()

        async def serve(hello, control):
            told.put_nowait(time.monotonic())
            await control.send(LinkAccept(epoch=told.qsize(), language_rank=1))
            await asyncio.sleep(0.1)

        def make(*_: object) -> Link:
            let_go.wait(20)
            raise ConnectionLost("let go")

        sock = listen("127.0.0.1")
        door = Doorkeeper(sock, serve, token=TOKEN, messages=LinkMessage, max_frame=MAX_LINK_FRAME, name="links")
        hello = LinkHello(token=TOKEN, encode_rank=0, pid=os.getpid(), fingerprint=FINGERPRINT)

        def nothing(*_: object) -> None:
            return

        links = EncodeLinks(hello, on_up=nothing, on_down=nothing, on_frame=nothing, on_refused=nothing)
        links.connect([(1, *sock.getsockname()[:2])], make)
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


# ---- the two ends tell each other where they are ----

GARBAGE = [b"", bytes(5000), b"somewhere", bytes(170)]
"""Neither of a possible length, twice; nor of the form."""


@dataclass
class Played:
    """A language rank that accepts, and then does as the test says."""

    address: tuple[str, int]
    controls: asyncio.Queue[Connection]

    async def accepted(self) -> Connection:
        """The next connection, when the encode rank's end has said where it is."""
        control = await asyncio.wait_for(self.controls.get(), SOON_S)
        assert isinstance(await control.receive(SOON_S), LinkAddress)
        return control


@asynccontextmanager
async def played() -> AsyncIterator[Played]:
    """With an encode rank's end that dials it."""
    controls, made, over = asyncio.Queue[Connection](), list[Connection](), asyncio.Event()

    async def serve(_, control: Connection) -> None:
        made.append(control)
        await control.send(LinkAccept(epoch=len(made), language_rank=1))
        controls.put_nowait(control)
        await over.wait()

    sock = listen("127.0.0.1")
    door = Doorkeeper(sock, serve, token=TOKEN, messages=LinkMessage, max_frame=MAX_LINK_FRAME, name="links")
    hello = LinkHello(token=TOKEN, encode_rank=0, pid=os.getpid(), fingerprint=FINGERPRINT)

    def nothing(*_: object) -> None:
        return

    links = EncodeLinks(hello, on_up=nothing, on_down=nothing, on_frame=nothing, on_refused=nothing)
    links.connect([(1, *sock.getsockname()[:2])], process_group_links("127.0.0.1"))
    try:
        yield Played(sock.getsockname()[:2], controls)
    finally:
        await links.close()
        over.set()
        door.close()
        await door.wait_closed()


def address_of(it: System) -> tuple[str, int]:
    return it.hub.peers.language_ranks[0][1:]


async def says_hello(address: tuple[str, int], rank: int) -> Connection:
    """An encode rank that has been accepted, and told where the language rank's end is."""
    control = await connect_link(address, deadline_s=5)
    await control.send(LinkHello(token=TOKEN, encode_rank=rank, pid=1, fingerprint=OF_RUNNING))
    assert isinstance(await control.receive(5), LinkAccept)
    assert isinstance(await control.receive(5), LinkAddress)
    return control


_before: set[threading.Thread] = set()
"""Threads of the tests before: an `LLM` that somebody still has keeps those of its link."""


@pytest.fixture(autouse=True)
def threads_of_before():
    _before.clear()
    _before.update(threading.enumerate())


def link_threads() -> list[str]:
    """Of this test."""
    return [one.name for one in threading.enumerate() if one.name.startswith("link-") and one not in _before]


async def no_threads() -> None:
    """Soon: Gloo by itself would wait for 20 s."""
    await until(lambda: not link_threads(), SOON_S, link_threads)


def test_an_encode_rank_that_dies_before_it_has_said_where_it_is_leaves_no_thread():
    async def scenario():
        async with running(kind="own") as it:
            for rank in range(1, 4):
                (await says_hello(address_of(it), rank)).abort()
            await no_threads()
            await it.start_encode_rank()

    run(scenario)


def test_a_language_rank_that_dies_before_it_has_said_where_it_is_is_dialled_again_at_once():
    async def scenario():
        async with played() as it:
            for _ in range(3):
                control = await it.accepted()
                assert len(link_threads()) == 1
                control.abort()
        await no_threads()

    run(scenario)


@pytest.mark.parametrize("garbage", GARBAGE, ids=len)
def test_an_encode_rank_s_garbage_in_place_of_an_address_ends_its_connection(garbage):
    async def scenario():
        async with running(kind="own") as it:
            control = await says_hello(address_of(it), 1)
            await control.send(LinkAddress(address=garbage))
            with pytest.raises(ConnectionLost):
                await control.receive(SOON_S)
            await no_threads()
            await it.start_encode_rank()

    run(scenario)


@pytest.mark.parametrize("garbage", GARBAGE, ids=len)
def test_a_language_rank_s_garbage_in_place_of_an_address_ends_its_connection(garbage):
    async def scenario():
        async with played() as it:
            control = await it.accepted()
            await control.send(LinkAddress(address=garbage))
            with pytest.raises(ConnectionLost):
                await control.receive(SOON_S)
            await it.accepted()

    run(scenario)


@pytest.mark.parametrize("size", [0, 4097])
def test_an_address_of_no_possible_length_ends_the_connection(size):
    async def scenario():
        near, far = await link_pair()
        await far.send(LinkAddress(address=bytes(4096)))
        assert await near.receive(1) == LinkAddress(address=bytes(4096))
        await far.send(LinkAddress(address=bytes(size)))
        with pytest.raises(FrameError, match="length"):
            await near.receive(1)
        await far.close()

    run(scenario)


def test_a_second_address_is_no_answer():
    async def scenario():
        near, far = await link_pair()

        def make(side: str, *others: Any) -> Any:
            return others[-1](side.encode())

        with ThreadPoolExecutor(1) as thread:
            await far.send(LinkAddress(address=b"first"))
            await far.send(LinkAddress(address=b"second"))
            assert await meet(near, thread, make, "encode", 0, 1, 1) == b"first"
        assert await near.receive(1) == LinkAddress(address=b"second")
        assert await far.receive(1) == LinkAddress(address=b"encode")
        await near.close()
        await far.close()

    run(scenario)


_SLOW_NAMES = """
#include <sys/socket.h>
#include <unistd.h>
int getnameinfo(const struct sockaddr *a, socklen_t n, char *h, socklen_t hn, char *s, socklen_t sn, int f) {
    write(1, "asked\\n", 6);
    sleep(5);
    if (h && hn) *h = 0;
    if (s && sn) *s = 0;
    return 0;
}
"""
_MAKES_A_LINK = """
import time
from tests.support.link_scenarios import run, running
async def scenario():
    async with running(kind="own") as it:
        started = time.monotonic()
        await it.start_encode_rank()
        print(time.monotonic() - started, flush=True)
run(scenario)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_no_name_server_is_asked_for_a_link(tmp_path):
    """PyTorch's TCPStore asks one for each client, and serves nobody else until it answers, or for 5 s."""
    library = tmp_path / "slow.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-w", "-xc", "-o", str(library), "-"], input=_SLOW_NAMES.encode(), check=True
    )
    env = os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(Path(__file__).parents[2])}
    told = subprocess.run([sys.executable, "-c", _MAKES_A_LINK], env=env, capture_output=True, text=True, timeout=100)
    asks = [sys.executable, "-c", "import socket; socket.getnameinfo(('127.0.0.1', 1), 0)"]
    assert b"asked" in subprocess.run(asks, env=env, capture_output=True, timeout=60).stdout, "it would be seen"
    assert told.returncode == 0, told.stdout + told.stderr
    assert "asked" not in told.stdout
    assert float(told.stdout) < 4
